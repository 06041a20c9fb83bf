"""The tables, paths, links, example recipe and figure in the documentation match the code."""

import re
import runpy
from pathlib import Path

import pytest
import yaml

from hypermoe_ds.modeling import PRESETS, HyperMoEConfig
from hypermoe_ds.run_config import RunConfig, settings_table
from hypermoe_ds.training import ds_config

REPOSITORY = Path(__file__).parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))
PAGES = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "ds_configs/README.md", *DOCS]
# These pages may name paths that do not exist, such as old paths and folders that a user creates.
PAGES_WITH_MISSING_PATHS = {"CHANGELOG.md", "CONTRIBUTING.md"}
CODE_FOLDERS = ("pretrain", "hypermoe_ds", "launch", "tools", "benchmarks")


def page(name: str) -> str:
    return (REPOSITORY / name).read_text(encoding="utf-8")


def between_markers(table: str, name: str) -> str:
    [content] = re.findall(f"<!-- {table} -->\n(.*?)<!-- /{table} -->", page(name), re.DOTALL)
    return str(content)


def blocks(name: str, language: str = "") -> list[str]:
    return re.findall(f"^```{language}\n(.*?)^```$", page(name), re.DOTALL | re.MULTILINE)


def anchors(name: str) -> set[str]:
    """Return the anchors of a page's headings, as GitHub derives them."""
    text = re.sub(r"^```.*?^```$", "", page(name), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_settings_page_lists_the_settings_of_the_code() -> None:
    table = between_markers("settings", "docs/SETTINGS.md")
    assert table == settings_table(), "run: python tools/doc_tables.py --write docs/SETTINGS.md"


def test_models_page_lists_the_sizes_of_the_presets() -> None:
    table = between_markers("presets", "docs/MODELS.md")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    expected = []
    for name, fields in PRESETS.items():
        model_config = HyperMoEConfig(**fields)
        counts = model_config.parameter_counts()
        row = [f"`{name}`", *(f"{n / 1e6:,.1f} M" for n in (counts.total, counts.active, counts.hypernetwork))]
        row.append(f"{len(model_config.moe_layers)}, {model_config.num_experts}, {model_config.num_experts_per_tok}")
        flops = (model_config.forward_flops_per_token(2048), model_config.generation_flops(1))
        row += [f"{n / 1e6:,.1f}" for n in flops]
        expected.append(row)
    assert rows == expected, "run: python tools/doc_tables.py --write docs/MODELS.md"


@pytest.mark.parametrize("name", ["docs/SETTINGS.md", "docs/MODELS.md", "docs/METRICS.md"])
def test_tables_of_a_page_are_up_to_date(name: str) -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/doc_tables.py"))
    assert tool["with_tables"](page(name)) == page(name), f"run: python tools/doc_tables.py --write {name}"


def test_tables_are_replaced_between_their_markers() -> None:
    tool = runpy.run_path(str(REPOSITORY / "tools/doc_tables.py"))
    text = "a\n<!-- settings -->\nold\n<!-- /settings -->\nb\n"
    assert tool["with_tables"](text) == f"a\n<!-- settings -->\n{settings_table()}<!-- /settings -->\nb\n"
    assert tool["with_tables"]("no markers\n") == "no markers\n"


def test_recipe_in_the_readme_is_valid() -> None:
    [recipe] = blocks("README.md", "yaml")
    RunConfig.model_validate(yaml.safe_load(recipe)).check()


@pytest.mark.parametrize(("file", "root"), [(".gitignore", "/"), (".dockerignore", "")])
def test_files_that_the_readme_asks_users_to_create_are_ignored(file: str, root: str) -> None:
    created = re.findall(r"Save as `(\S+)`|^cp \S+ (\S+)", page("README.md"), re.MULTILINE)
    names = {"".join(pair) for pair in created}
    assert names == {"my.yaml", "hostfile"}
    assert {root + name for name in names} <= set(page(file).splitlines())


def test_keys_of_a_deepspeed_json_are_documented() -> None:
    text = page("ds_configs/README.md")

    def keys(known: object) -> set[str]:
        return {key for name in known for key in (name, *keys(known[name]))} if hasattr(known, "keys") else set()

    documented = set(re.findall(r"`([\w.]+)`", text))
    documented |= {part for key in documented for part in key.split(".")}
    assert keys(ds_config._KNOWN) | ds_config._OWNED_BY_RECIPE.keys() <= documented
    assert set(ds_config._OWNED_BY_RECIPE.values()) <= documented
    assert {path.name for path in (REPOSITORY / "ds_configs").glob("*.json")} <= set(re.findall(r"`(\w+\.json)`", text))


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_point_to_existing_files_and_headings(name: str) -> None:
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        path, _, anchor = link.partition("#")
        target = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        if "://" in link:
            continue
        if not target.exists() or (
            anchor and anchor not in anchors(target.resolve().relative_to(REPOSITORY).as_posix())
        ):
            missing.append(link)
    assert missing == []


@pytest.mark.parametrize("name", [name for name in PAGES if name not in PAGES_WITH_MISSING_PATHS])
def test_paths_in_the_text_exist(name: str) -> None:
    named = re.findall(
        r"(?<![\w/.-])(?:pretrain|hypermoe_ds|launch|ds_configs|tools|benchmarks|tests|docs)/[\w/.-]*\w", page(name)
    )
    assert [path for path in named if not (REPOSITORY / path).exists()] == []


def test_table_of_contents_lists_every_page() -> None:
    listed = set(re.findall(r"^\| \[[^\]]+\]\(([^)#]+)\)", page("docs/README.md"), re.MULTILINE))
    assert {Path(name).name for name in DOCS} - {"README.md"} <= listed


def tree_of_architecture() -> set[str]:
    """Return the paths in the file tree of docs/ARCHITECTURE.md.

    The tree indents each level by two spaces and ends the name of each folder with a slash.
    """
    paths, parents = set(), []
    for line in blocks("docs/ARCHITECTURE.md")[0].splitlines():
        entry = line.strip().split()[0]
        parents[(len(line) - len(line.lstrip())) // 2 :] = [entry]
        paths.add("".join(parents))
    return paths


def test_tree_of_the_architecture_page_matches_the_files() -> None:
    tree = tree_of_architecture()
    assert [path for path in sorted(tree) if not (REPOSITORY / path).exists()] == []
    files = [path for folder in CODE_FOLDERS for kind in ("*.py", "*.sh") for path in (REPOSITORY / folder).rglob(kind)]
    files += [path for path in (REPOSITORY / "launch").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    files += [REPOSITORY / name for name in DOCS]
    modules = {file.relative_to(REPOSITORY).as_posix() for file in files if file.name != "__init__.py"}
    assert sorted(modules - tree) == []


def test_figure_is_up_to_date() -> None:
    script = runpy.run_path(str(REPOSITORY / "docs/make_figure.py"))
    assert (REPOSITORY / "docs/hypermoe.svg").read_bytes() == script["figure"]().encode()
