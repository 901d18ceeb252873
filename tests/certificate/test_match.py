from __future__ import annotations

from autoquant.certificate.claims import keep
from autoquant.certificate.match import match
from autoquant.certificate.prove import fitting
from autoquant.config.format import Config, Read, Space, Writer, edited
from tests.certificate.test_certify import proved


def shared_heads(whole: str, *others: tuple[str, str]) -> Config:
    """R2 of ``whole`` layers, and of others that share the heads of a first one: (its number, those that read it)."""
    _, config = proved("llama")
    (first,) = [space for space in config.rotation.spaces if space.kind == "R2"]
    spaces = [edited(first, layers=whole)]
    for number, (owner, readers) in enumerate(others):
        writers = tuple(edited(writer, layers=owner) for writer in first.writers)
        reads = tuple(edited(read, layers=readers) for read in first.reads)
        spaces.append(edited(first, name=f"{first.name} @{number}", layers=None, writers=writers, reads=reads))
    return edited(keep(config, []), rotation=edited(config.rotation, spaces=tuple(spaces), online=()))


def layers_of(space: Space) -> list[str | None]:
    members: tuple[Writer | Read, ...] = (*space.writers, *space.reads)
    return [space.layers, *dict.fromkeys(member.layers for member in members)]


HELD = [f"model.layers.{i}.self_attn.{name}_proj.weight" for i in range(9) for name in "vo"]


def test_spaces_of_one_name_keep_their_own_layers() -> None:
    """Of two kinds of layers each shares the heads of its own first one; neither takes the layers of the other."""
    large = shared_heads("0-2", ("3", "3,5,7"), ("4", "4,6"))
    small = shared_heads("0-1", ("2", "2,4,6"), ("3", "3,5,7"))
    found = match(large, small, HELD)
    assert found.refused == {}
    assert [layers_of(space) for space in found.config.rotation.spaces] == [
        ["0-2", None],
        [None, "3", "3-7:2"],
        [None, "4", "4,6"],
    ]


def test_online_rotations_of_one_module_keep_their_own_layers() -> None:
    """Two kinds of layers, of other sizes, rotate at one path."""
    _, config = proved("llama")
    first = next(online for online in config.rotation.online if online.kind == "R3")

    def two(*layers: str) -> Config:
        online = tuple(edited(first, layers=those) for those in layers)
        return edited(keep(config, []), rotation=edited(config.rotation, spaces=(), online=online))

    found = match(two("0-4,6-10", "5-11:6"), two("0-4", "5"), HELD[:12])
    assert [online.layers for online in found.config.rotation.online] == ["0-4", "5"]
    assert found.refused == {}


def test_an_online_rotation_of_a_further_adapter_is_that_of_one_the_small_model_has() -> None:
    _, config = proved("llama")
    first = next(online for online in config.rotation.online if online.kind != "R3")

    def at(*paths: str) -> Config:
        online = tuple(edited(first, path=f"model.layers.{{layer}}.{path}") for path in paths)
        return edited(keep(config, []), rotation=edited(config.rotation, spaces=(), online=online))

    held = ["model.layers.0.adapters.0.weight", "model.layers.1.adapters.1.weight", "model.layers.1.up.weight"]
    small = at("adapters.0")
    assert match(at("adapters.0", "adapters.2"), small, held).refused == {}
    shown = match(at("adapters.0", "adapters.1"), small, held).refused  # it has this one, and says nothing of it
    other = match(at("adapters.0", "mixers.2"), small, held).refused
    assert [name for name, _ in shown] == ["model.layers.{layer}.adapters.1"]
    assert [name for name, _ in other] == ["model.layers.{layer}.mixers.2"]
    assert len(match(at("adapters.0", "adapters.2"), small).refused) == 1  # nothing is known of what it has


def test_claims_that_do_not_fit_beside_each_other_are_left_out() -> None:
    """Each fits alone; the first of them is kept and the rest is not lost with the other."""
    loaded, config = proved("llama")
    (space,) = [space for space in config.rotation.spaces if space.kind == "R2"]
    spaces = (*config.rotation.spaces, edited(space, name="again"))
    both = edited(config, rotation=edited(config.rotation, spaces=spaces))
    kept, refused = fitting(loaded.module, both)
    assert kept == config
    assert list(refused) == [("again", "R2")]
    assert "already in" in refused["again", "R2"]
    assert fitting(loaded.module, config) == (config, {})
