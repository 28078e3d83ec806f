"""One class per failure; every message names the remedy."""

from __future__ import annotations


class GemsError(Exception):
    """Base of everything that this package raises on purpose."""


class Refused(GemsError, ValueError):
    """A kernel does not do this case. In a patch the original does it, and the report counts the reason."""


class Unsettled(Refused):
    """What was settled for a layer no longer holds; the original does this call, and the next one settles anew."""


class DriftError(GemsError):
    """A place in vLLM is not what we know how to replace."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(f"{where}: {why}. Exclude the patch, or use a vLLM release named in the support table.")


class NotBoundError(GemsError):
    """Strict mode: a patch that was asked for is not in place."""

    def __init__(self, patch: str, why: str) -> None:
        super().__init__(f"{patch} was asked for and is not in place: {why}. Leave it out of `include`, or strict off.")


class UnknownNameError(GemsError, KeyError):
    """A name that the catalog does not have."""

    def __init__(self, kind: str, name: str, near: list[str]) -> None:
        hint = f"did you mean {', '.join(near)}?" if near else "`vllm-gems report --all` lists the names."
        super().__init__(f"no {kind} is called {name!r}; {hint}")

    def __str__(self) -> str:  # KeyError would print the repr
        return str(self.args[0])


class DuplicateNameError(GemsError):
    """Two distributions declare the same name."""

    def __init__(self, kind: str, name: str, first: str, second: str) -> None:
        super().__init__(
            f"{kind} {name!r} is declared by {first} and by {second}; uninstall one of them, or rename one."
        )


class NoDeviceError(GemsError, RuntimeError):
    """There is nothing to run a Triton kernel on."""

    def __init__(self, device: str) -> None:
        super().__init__(
            f"no Triton kernel can run on {device!r} here; put the tensors on a GPU, or set TRITON_INTERPRET=1 before "
            "the first import of triton to run the kernels in its interpreter (slow, for tests)."
        )


class LateCompileError(GemsError, RuntimeError):
    """A kernel was compiled when compilations were forbidden; passes through to who forbade them, as vLLM's would."""

    def __init__(self, kernel: str, why: str) -> None:
        super().__init__(
            f"{kernel} was compiled after warm-up: {why} Exclude the patch whose kernel it is, or serve without "
            "--jit-monitor-mode=error; and please report it, because kernels should be ready by then."
        )
