"""Triton's interpreter without needless work: it makes the same types and constants anew each time.

With this it takes half the time, and its results are the same bit for bit
(`test_interpreted_as_it_comes` compares them). Left out are its checks of overflow and of the size
of numbers.
"""

import inspect
import math


def patch_once(interpreter):
    """The language is patched at the first launch and stays so; a built-in is called without two
    layers of wrappers."""
    done, patch = {}, interpreter._patch_lang

    def patch_attr(obj, name, member, builder, scope):
        inner = inspect.unwrap(member)

        def call(*args, **kwargs):
            kwargs["_semantic"] = interpreter.interpreter_semantic
            return inner(*args, **kwargs)

        scope.set_attr(obj, name, call)

    class Nothing:
        def restore(self):
            pass

    def patch_lang(fn):
        names = fn.__globals__
        if id(names) not in done:
            done[id(names)] = names, patch(fn)
        return Nothing()

    interpreter._patch_attr, interpreter._patch_lang = patch_attr, patch_lang


def remember_types(interpreter, core):
    "Types of blocks, shapes of tensors and NumPy's names of types, made once each."
    blocks, shapes, numpy_types = {}, {}, {}
    make_block, np_dtype = core.block_type.__init__, interpreter._get_np_dtype

    def sizes(shape):
        if shape not in shapes:
            shapes[shape] = (
                core.constexpr(math.prod(shape)),
                core.tuple([core.constexpr(s) for s in shape]),
            )
        return shapes[shape]

    def block(self, element_ty, shape):
        key = element_ty.name, *[s.value if isinstance(s, core.constexpr) else s for s in shape]
        known = blocks.get(key)
        if known is None:
            make_block(self, element_ty, shape)
            self.sizes = sizes((*key[1:],))
            blocks[key] = dict(vars(self))
        else:
            vars(self).update(known)

    def tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = type.sizes

    def of_numpy(type):
        name = (type.element_ty if isinstance(type, core.block_type) else type).name
        if name not in numpy_types:
            numpy_types[name] = np_dtype(type)
        return numpy_types[name]

    core.dtype.sizes = sizes(())  # those of a scalar
    core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype = (
        block,
        tensor,
        of_numpy,
    )
    core.block_type.to_ir = lambda self, builder: self


def light_handles(interpreter):
    "A handle is made without a check of its size."

    def init(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    interpreter.TensorHandle.__init__ = init


def short_cuts(core, semantic):
    "Two operands of one type need no cast; what a constant becomes beside a type is remembered."
    unwrap, check, broadcast = (
        core._unwrap_if_constexpr,
        semantic.binary_op_type_checking_impl,
        semantic.broadcast_impl_value,
    )
    constants = {}

    def equal(self, other):
        if isinstance(other, core.constexpr):
            other = other.value
        return self is other or isinstance(other, core.dtype) and self.name == other.name

    def constant(self, x, beside, first, *rules):
        "The tensor that `x` becomes beside another, or None where the other one is cast."
        key = type(x), str(x), beside.dtype.name, first, rules
        if key not in constants:
            scalar = core.tensor(beside.handle, beside.dtype)
            a, b = check(self, *((x, scalar) if first else (scalar, x)), *rules)
            made, other = (a, b) if first else (b, a)
            constants[key] = made if other is scalar else None
        return constants[key]

    def both(
        self,
        lhs,
        rhs,
        allow_lhs_ptr=False,
        allow_rhs_ptr=False,
        arithmetic_check=True,
        div_or_mod=False,
    ):
        rules = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
        mine, yours = isinstance(lhs, core.tensor), isinstance(rhs, core.tensor)
        if mine and yours:
            if (
                lhs.dtype is rhs.dtype
                and not lhs.dtype.is_ptr()
                and (not div_or_mod or lhs.dtype.is_fp32())
            ):
                return spread(self, lhs, rhs)
        elif mine and type(rhs) in (int, float):
            cast = constant(self, rhs, lhs, False, *rules)
            if cast is not None:
                return spread(self, lhs, cast)
        elif yours and type(lhs) in (int, float):
            cast = constant(self, lhs, rhs, True, *rules)
            if cast is not None:
                return spread(self, cast, rhs)
        return check(self, lhs, rhs, *rules)

    def fill(self, scalar, like):
        kind = core.block_type(scalar.dtype, like.shape)
        return self.tensor(self.builder.create_splat(kind, scalar.handle), kind)

    def spread(self, lhs, rhs):
        wide, broad = lhs.type.is_block(), rhs.type.is_block()
        if wide and broad:
            return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)
        if wide:
            return lhs, fill(self, rhs, lhs.type)
        if broad:
            return fill(self, lhs, rhs.type), rhs
        return lhs, rhs

    core.dtype.__eq__ = equal
    core._unwrap_if_constexpr = lambda o: o if isinstance(o, core.tensor) else unwrap(o)
    semantic.binary_op_type_checking_impl, semantic.broadcast_impl_value = both, spread


def speed_up():
    "All of it, for the Triton it was written for; any other is left as it comes."
    import triton

    if triton.__version__ != "3.7.1":
        return
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
    patch_once(interpreter)
    remember_types(interpreter, core)
    light_handles(interpreter)
    short_cuts(core, TritonSemantic)
