// What a chapter has below its mark is folded before it is painted: this runs as the first thing
// inside that part. Without JavaScript, and in print, all of it is open.
window.shipped = (function (body) {
  const section = body.parentNode, heading = section.querySelector("h2");
  const button = document.createElement("button");
  // hidden so that the browser's own search looks inside, where it can
  const folded = "onbeforematch" in section ? "until-found" : "";
  const memory = "shipped " + location.pathname; // so that a reload is as tall as it was

  function show(open) {
    if (open) body.removeAttribute("hidden");
    else body.setAttribute("hidden", folded);
    button.setAttribute("aria-expanded", open);
    try { sessionStorage.setItem(memory, open ? "open" : ""); } catch (error) { /* not kept */ }
  }

  function target(hash) {
    try {
      const place = document.getElementById(decodeURIComponent(hash.slice(1)));
      return place && section.contains(place) && place;
    } catch (error) { return null; }
  }

  // Open for a place inside, and go there; a place outside changes nothing.
  function look(hash) {
    const place = target(hash || location.hash);
    if (!place || !body.hidden) return;
    show(true);
    place.scrollIntoView();
  }

  let before = "";
  try { before = sessionStorage.getItem(memory); } catch (error) { /* none is kept */ }
  button.type = "button";
  button.setAttribute("aria-controls", body.id);
  button.append(...heading.childNodes);
  heading.append(button);
  show(before === "open");
  button.addEventListener("click", () => show(body.hasAttribute("hidden")));
  body.addEventListener("beforematch", () => show(true));
  addEventListener("hashchange", () => look());
  document.addEventListener("click", (event) => {
    const link = event.target.closest("a[href*='#']");
    if (link && link.pathname === location.pathname) look(link.hash);
  }, true);
  return { show, look };
})(document.currentScript.parentNode);
