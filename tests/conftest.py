import inspect
import json
from pathlib import Path

import pytest
from stages import TABLES, prepare, run_stage

from rlaifv_nb.records import write_json

TABLE = Path(__file__).resolve().parent.parent / "data/results/architectures.json"
SHOWN = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption(
        "--write-table",
        action="store_true",
        help=f"write what the tests show of each architecture to {TABLE.name}",
    )


def pytest_configure(config):
    config.stash[SHOWN] = {}


@pytest.fixture
def show(request):
    """A function that notes what a test has shown of a model, or why it cannot be; called when the assertions
    about it are behind.
    """

    def note(model, *properties, but=""):
        request.config.stash[SHOWN].setdefault((request.module.__name__, model), {}).update(
            {p: but or "yes" for p in properties}
        )

    return note


def check_table(request, part, module, models):
    """The stored table says of `models` exactly what the tests in `module` (a dict of its names) have shown
    in this session; or it is written.

    A table that claims something no test has shown, because it failed or is gone, is an error; so is one that
    claims less.
    """
    cases = {
        name
        for name, f in module.items()
        if name.startswith("test_") and "show" in inspect.signature(f).parameters
    }
    ran = [
        item
        for item in request.session.items
        if getattr(item, "originalname", "") in cases and item.module.__name__ == module["__name__"]
    ]
    if len(ran) < len(cases) * len(models):
        pytest.skip("needs all tests of this file")
    shown = {
        model: dict(sorted(request.config.stash[SHOWN].get((module["__name__"], model), {}).items()))
        for model in models
    }
    stored = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}
    if request.config.getoption("--write-table"):
        assert request.session.testsfailed == 0 and len({tuple(row) for row in shown.values()}) == 1, (
            "a table is written when everything has passed"
        )
        write_json(TABLE, dict(sorted((stored | {part: shown}).items())))
    else:
        assert stored.get(part) == shown, (
            "data/results/architectures.json says something else: pytest --write-table, if the tests are "
            "right"
        )


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "A whole small run, stage after stage, that nothing interrupts."
    run = tmp_path_factory.mktemp("undisturbed")
    prepare(run)
    for stage in TABLES:
        run_stage(stage, run, run / stage)
    return run
