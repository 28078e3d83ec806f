"""Names resolve, third parties come through the same door, clashes name both sides."""

from __future__ import annotations

import pytest
import toy

from vllm_gems.catalog import catalog, lookup
from vllm_gems.errors import DuplicateNameError, UnknownNameError


def test_every_name_resolves() -> None:
    found = catalog()
    for patch in found.patches.values():
        assert patch.seam in found.seams
        assert set(patch.kernels) <= set(found.kernels)
        assert patch.why
    assert set(found.seams) == {patch.seam for patch in found.patches.values()}


def test_kernels_declare_what_tests_need() -> None:
    for kernel in catalog().kernels.values():
        assert kernel.op.__doc__
        assert kernel.schema.startswith(f"{kernel.name}(")
        assert [case for case in kernel.cases if not case.bench]
        assert len({case.name for case in kernel.cases}) == len(kernel.cases)
        assert bool(kernel.stock) == (kernel.stock_call is not None)
        assert {"float32", "float16", "bfloat16"} <= set(kernel.dtypes) or "fp8" in kernel.name
        assert "bfloat16" in kernel.dtypes


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(UnknownNameError, match=r"called 'layernorm.rmsnorm'; did you mean layernorm.rms_norm"):
        lookup("patch", catalog().patches, "layernorm.rmsnorm")


def test_two_distributions_with_one_name() -> None:
    class Other:
        @toy.hookimpl
        def vllm_gems_patches(self) -> list[toy.Patch]:
            return [toy.patch("toy.layer", "layer", distribution="other-gems")]

    with pytest.raises(DuplicateNameError, match=r"patch 'toy.layer' is declared by vllm-gems and by other-gems"):
        toy.catalog(plugins=[Other()])


def test_a_patch_without_a_seam_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="no seam is called 'nowhere'"):
        toy.catalog(toy.patch("toy.x", "nowhere"))


def test_a_misspelt_hook_is_an_error() -> None:
    class Misspelt:
        @toy.hookimpl
        def vllm_gems_patchs(self) -> list[toy.Patch]:
            return []

    found = toy.catalog(plugins=[Misspelt()])
    with pytest.raises(Exception, match="vllm_gems_patchs"):
        found.manager.check_pending()
