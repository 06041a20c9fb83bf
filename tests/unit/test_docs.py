"""The documentation says what the code says: tables, paths, links, the example recipe and the picture."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.run_config import RunConfig, settings_table
from hypermoe_ds.training import ds_config

REPOSITORY = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "ds_configs/README.md",
    "docs/METHOD.md",
    "docs/ARCHITECTURE.md",
    "docs/CLUSTERS.md",
    "docs/RELIABILITY.md",
    "docs/DEPLOYMENT.md",
    "docs/METRICS.md",
]
ROOMS = ("pretrain", "hypermoe_ds", "launch", "tools")


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def between_markers(name: str) -> str:
    [content] = re.findall(f"<!-- {name} -->\n(.*?)<!-- /{name} -->", page("README.md"), re.DOTALL)
    return str(content)


def blocks(name: str, language: str = "") -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


def test_the_readme_lists_the_settings_of_the_code() -> None:
    assert between_markers("settings") == settings_table(), "run: python tools/doc_tables.py --write README.md"


def test_the_readmes_presets_have_the_numbers_of_the_code() -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in between_markers("presets").splitlines()[2:]]
    expected = []
    for name, fields in PRESETS.items():
        config = HyperMoEConfig(**fields)
        counts = config.parameter_counts()
        row = [f"`{name}`", *(f"{n / 1e6:,.1f} M" for n in (counts.total, counts.active, counts.hypernetwork))]
        row.append(f"{len(config.moe_layers)}, {config.num_experts}, {config.num_experts_per_tok}")
        row += [f"{n / 1e6:,.1f}" for n in (config.forward_flops_per_token(2048), config.generation_flops(1))]
        expected.append(row)
    assert rows == expected, "run: python tools/doc_tables.py --write README.md"


@pytest.mark.parametrize("name", ["README.md", "docs/METRICS.md"])
def test_the_tables_of_a_page_are_those_that_the_tool_writes(name: str) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/doc_tables.py"))
    assert tool["with_tables"](page(name)) == page(name), f"run: python tools/doc_tables.py --write {name}"


def test_the_readmes_recipe_is_valid() -> None:
    [recipe] = blocks("README.md", "yaml")
    RunConfig.model_validate(yaml.safe_load(recipe)).check()


@pytest.mark.parametrize(("file", "root"), [(".gitignore", "/"), (".dockerignore", "")])
def test_what_the_readme_has_users_make_is_not_committed_nor_put_into_an_image(file: str, root: str) -> None:
    made = re.findall(r"Save as `(\S+)`|^cp \S+ (\S+)", page("README.md"), re.MULTILINE)
    names = {"".join(pair) for pair in made}
    assert names == {"my.yaml", "hostfile"}
    assert {root + name for name in names} <= set(page(file).splitlines())


def test_what_may_stand_in_a_deepspeed_json_and_what_may_not_is_documented() -> None:
    text = page("ds_configs/README.md")

    def keys(known: object) -> set[str]:
        return {key for name in known for key in (name, *keys(known[name]))} if hasattr(known, "keys") else set()

    documented = set(re.findall(r"`([\w.]+)`", text))
    documented |= {part for key in documented for part in key.split(".")}
    assert keys(ds_config._KNOWN) | ds_config._OWNED_BY_RECIPE.keys() <= documented
    assert set(ds_config._OWNED_BY_RECIPE.values()) <= documented
    assert {path.name for path in (REPOSITORY / "ds_configs").glob("*.json")} <= set(re.findall(r"`(\w+\.json)`", text))


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_lead_somewhere(name: str) -> None:
    targets = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", page(name)) if "://" not in link]
    assert [link for link in targets if not ((REPOSITORY / name).parent / link).exists()] == []


@pytest.mark.parametrize("name", [name for name in PAGES if name != "CONTRIBUTING.md"])
def test_paths_that_are_named_exist(name: str) -> None:
    named = re.findall(
        r"(?<![\w/.-])(?:pretrain|hypermoe_ds|launch|ds_configs|tools|tests|docs)/[\w/.-]*\w", page(name)
    )
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def tree_of_architecture() -> set[str]:
    """Paths of the tree: two spaces a level, a folder ends with a slash."""
    paths, parents = set(), []
    for line in blocks("docs/ARCHITECTURE.md")[0].splitlines():
        entry = line.strip().split()[0]
        parents[(len(line) - len(line.lstrip())) // 2 :] = [entry]
        paths.add("".join(parents))
    return paths


def test_the_tree_of_the_architecture_is_the_tree_on_disk() -> None:
    tree = tree_of_architecture()
    assert [path for path in sorted(tree) if not (REPOSITORY / path).exists()] == []
    files = [path for room in ROOMS for kind in ("*.py", "*.sh") for path in (REPOSITORY / room).rglob(kind)]
    files += [path for path in (REPOSITORY / "launch").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    modules = {file.relative_to(REPOSITORY).as_posix() for file in files if file.name != "__init__.py"}
    missing = {path for path in modules if not path.startswith("benchmarks/")} - tree
    assert sorted(missing) == []


def test_the_picture_is_what_its_script_draws() -> None:
    script = runpy.run_path(str(REPOSITORY / "docs/make_figure.py"))
    assert (REPOSITORY / "docs/hypermoe.svg").read_bytes() == script["figure"]().encode()
