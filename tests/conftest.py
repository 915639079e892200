import pytest
from stages import TABLES, prepare, run_stage


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "A whole small run, stage after stage, that nothing interrupts."
    run = tmp_path_factory.mktemp("undisturbed")
    prepare(run)
    for stage in TABLES:
        run_stage(stage, run, run / stage)
    return run
