"""Why torch refuses a derivative, and what to do about it, in one line for each kind of reason."""

import re

_NAMED = re.compile(
    r"derivative for (?:aten::)?'?([\w:.]+?)'? is not implemented|forward AD with (\S+)"
    r"|backward through (\S+?)(?:\.default)? but no autograd formula"
)
_UNNAMED = {
    "once_differentiable": "a function marked once_differentiable",
    "numpy() on Tensor": "a custom autograd.Function whose backward() uses numpy",
    "jvp function": "a custom autograd.Function without jvp",
    "double backward": "a function that torch.compile has compiled",
}
_IN_STEPS = (
    "compute it within torch.nn.attention.sdpa_kernel(SDPBackend.MATH) (transformers: "
    "attn_implementation='eager')"
)
_FIRST_ONLY = "linear=Perturbed() with inner=LBFGS(), which takes first derivatives only"


def _operation(text: str) -> tuple[str | None, bool]:
    """What torch cannot differentiate, from its message, and whether that is fused attention."""
    named = _NAMED.search(text)
    if named is None:
        return next((what for sign, what in _UNNAMED.items() if sign in text), None), False
    name = named[named.lastindex or 0]
    fused = re.search("att(entio)?n|sdpa", name) is not None
    return (f"fused attention ({name})" if fused else name), fused


def of_gradients(error: RuntimeError) -> str:
    """Of ``torch.autograd.grad``: a second derivative is missing, or a graph is not as it was."""
    reason = str(error).strip().splitlines()[0].rstrip(".:;")[:200]
    what, fused = _operation(reason)
    expected, do = "one that torch can differentiate twice", "write it in operations that have one"
    if "`inputs` parameter" in reason:
        return (
            "inner loss: expected activation checkpointing that torch.autograd.grad can pass, got "
            "the reentrant one; give checkpoint() use_reentrant=False"
        )
    if "second time" in reason:
        return (
            "inner loss: expected its graph as learner(...) made it, got one that backward() or "
            "autograd.grad() has freed; leave both to adapt(), or pass retain_graph=True"
        )
    if fused:
        do = f"{_IN_STEPS}, use curvature=GaussNewton() if theta is the anchor alone"
    elif what is None:
        expected += ", its data left as they were until backward()"
        what, do = repr(reason), "clone what is changed in place"
    return f"inner loss: expected {expected}, got {what}; {do}, or use {_FIRST_ONLY}"


def of_forward_mode(error: NotImplementedError) -> str:
    """Of forward mode, which an operation does not have."""
    what, fused = _operation(str(error))
    do = "use GaussNewton(fallback=True), or curvature=Hessian()"
    if fused:
        do = f"{_IN_STEPS}, or use {_FIRST_ONLY}"
    what = what or "an operation without it"
    return f"expected a module whose operations all have a forward mode, got {what}; {do}"
