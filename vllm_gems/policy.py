"""What the user wants. The only module that reads environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

# name -> (default, meaning): the documentation, the CLI and vLLM's compile-cache key iterate this table.
VARIABLES: dict[str, tuple[str, str]] = {
    "VLLM_GEMS": ("1", "0 switches the plugin off: vLLM is left exactly as it is"),
    "VLLM_GEMS_INCLUDE": (
        "",
        "comma-separated names or globs; only these patches are bound (`default`: those that are without it)",
    ),
    "VLLM_GEMS_EXCLUDE": ("", "comma-separated names or globs; these patches are not bound"),
    "VLLM_GEMS_STRICT": ("0", "1 turns a refused or failing patch into an error instead of a fallback"),
    "VLLM_GEMS_VERBOSE": ("0", "1 prints the report when vLLM has loaded the plugin and when a process ends"),
    "VLLM_GEMS_REPORT": ("", "a folder into which every process writes its report as JSON when it ends"),
    "VLLM_GEMS_TUNED": (
        "",
        "the folder of what `vllm-gems pretune` and `bench` measured, else one in the user's cache folder",
    ),
}

_FALSE = ("", "0", "false", "no", "off")


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    parts = value.split(",") if isinstance(value, str) else value
    return tuple(part.strip() for part in parts if part.strip())


@dataclass(frozen=True)
class Policy:
    """Which patches are wanted, and how failures are treated."""

    enabled: bool = True
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    verbose: bool = False
    report_dir: str = ""

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Policy:
        """Read `VARIABLES` from `environ` (the process's own if None)."""
        env = os.environ if environ is None else environ

        def get(name: str) -> str:
            return env.get(name, VARIABLES[name][0]).strip()

        def flag(name: str) -> bool:
            return get(name).lower() not in _FALSE

        return cls(
            enabled=flag("VLLM_GEMS"),
            include=_names(get("VLLM_GEMS_INCLUDE")),
            exclude=_names(get("VLLM_GEMS_EXCLUDE")),
            strict=flag("VLLM_GEMS_STRICT"),
            verbose=flag("VLLM_GEMS_VERBOSE"),
            report_dir=get("VLLM_GEMS_REPORT"),
        )

    def replace(
        self,
        *,
        include: str | Iterable[str] | None = None,
        exclude: str | Iterable[str] | None = None,
        strict: bool | None = None,
        verbose: bool | None = None,
    ) -> Policy:
        """This policy with what a caller said in code laid over it; None keeps the present value."""
        return Policy(
            enabled=self.enabled,
            include=self.include if include is None else _names(include),
            exclude=self.exclude if exclude is None else _names(exclude),
            strict=self.strict if strict is None else strict,
            verbose=self.verbose if verbose is None else verbose,
            report_dir=self.report_dir,
        )

    def refuses(self, name: str, default: bool = True) -> str | None:
        """None if a patch of this name is wanted, else why not."""
        if not self.enabled:
            return "VLLM_GEMS=0"
        for glob in self.exclude:
            if fnmatchcase(name, glob):
                return f"excluded by {glob!r}"
        if self.include and not (default and "default" in self.include):
            return None if self.named(name) else "not in the include list"
        return None if default else f"off by default; VLLM_GEMS_INCLUDE=default,{name} adds it"

    def named(self, name: str) -> bool:
        """Whether this very patch was asked for, by name or glob."""
        return any(fnmatchcase(name, glob) for glob in self.include)

    def strangers(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names and globs of `include` and `exclude` that fit no patch of these names."""
        known = (*names, "default")
        globs = dict.fromkeys((*self.include, *self.exclude))
        return tuple(glob for glob in globs if not any(fnmatchcase(name, glob) for name in known))

    def fingerprint(self) -> str:
        """A text that differs whenever the set of wanted patches may differ; a salt for compile caches."""
        return f"{int(self.enabled)};{','.join(self.include)};{','.join(self.exclude)}"


def tuned_folder() -> str:
    """Where a user's measured configurations are: VLLM_GEMS_TUNED, or in the platform's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME", "").strip() or os.path.join(os.path.expanduser("~"), ".cache")
    return read_variables()["VLLM_GEMS_TUNED"].strip() or os.path.join(cache, "vllm_gems", "tuned")


def read_variables() -> dict[str, str]:
    """The present value of every variable in `VARIABLES`."""
    return {name: os.environ.get(name, default) for name, (default, _) in VARIABLES.items()}


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter in this process; Triton's own variable, read before its import."""
    return os.environ.get("TRITON_INTERPRET", "").strip().lower() not in _FALSE


def batch_invariant() -> bool:
    """Whether vLLM promises results that do not depend on the batch; its own variable."""
    return os.environ.get("VLLM_BATCH_INVARIANT", "").strip().lower() not in _FALSE
