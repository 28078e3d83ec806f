"""Our seams probed against recorded releases of vLLM: what is there is as we expect, what is not is known."""

from __future__ import annotations

import pytest
from recorded_world import VERSIONS, RecordedWorld

from vllm_gems.binders import BINDERS
from vllm_gems.catalog import catalog
from vllm_gems.nouns import Place, Seam
from vllm_gems.seams import KV_CACHE_LAYOUTS, PARTS

SEAMS = list(catalog().seams.values())


def verdicts(seam: Seam, world: RecordedWorld, platform: str) -> list[str | None]:
    places: list[Place] = [place for place in seam.places if place.platform in ("any", platform)]
    return [BINDERS[place.kind].refuses(place, world, platform) for place in places]


def number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def has(version: str, place: Place) -> bool:
    """Whether the release has the place, by what the place says of itself."""
    first, last = place.versions.split("-")
    return number(first) <= number(version) and number(version)[:2] <= number(last)


def test_the_releases_of_the_support_table_are_recorded() -> None:
    """One of each minor release."""
    assert [number(version)[:2] for version in VERSIONS] == [(0, minor) for minor in range(17, 34)]


@pytest.mark.parametrize("platform", ["cuda", "cpu"])
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_place_fits_exactly_where_the_seam_says(version: str, seam: Seam, platform: str) -> None:
    found = verdicts(seam, RecordedWorld.load(version), platform)
    if has(version, seam.places[0]):
        assert None in found, f"vLLM {version}: {found}"
    else:  # not there yet, or not as it is known
        assert None not in found


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: seam.name)
def test_a_drifted_release_is_refused(seam: Seam) -> None:
    """A signature or schema with one more argument is another one, whatever its defaults."""

    class Drifted(RecordedWorld):
        def signature(self, module: str, qualname: str) -> str | None:
            found = super().signature(module, qualname)
            return None if found is None else found.replace(")", ", new=None)")

        def schemas(self, op: str) -> tuple[str, ...]:
            return tuple(schema.replace(")", ", bool new=False)", 1) for schema in super().schemas(op))

    world = Drifted.load("0.26.0")
    for platform in ("cuda", "cpu"):
        for reason in verdicts(seam, world, platform):
            assert reason is not None
            assert "is now" in reason


@pytest.mark.parametrize("role", PARTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_every_part_of_a_layer_is_known(version: str, role: str) -> None:
    """All that may play the role: a model whose parts are not known keeps its own layers."""
    world = RecordedWorld.load(version)
    for place in PARTS[role]:
        reason = BINDERS[place.kind].refuses(place, world, "cuda")
        assert (reason is None) == has(version, place), f"{place}: {reason}"


def test_no_source_is_known_that_no_release_has() -> None:
    worlds = {version: RecordedWorld.load(version) for version in VERSIONS}
    for place in (place for alternatives in PARTS.values() for place in alternatives):
        recorded = {world.source_hash(place.module, place.name) for name, world in worlds.items() if has(name, place)}
        assert place.sources == recorded


def test_every_way_of_writing_the_cache_has_its_layout() -> None:
    (place,) = PARTS["cache write"]
    assert place.sources == set(KV_CACHE_LAYOUTS)
