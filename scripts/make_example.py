"""Make data/example/: a small real run of stages 01 to 04 on the icon world, which the notebooks use by default.

    python scripts/make_example.py
"""
import shutil
from pathlib import Path

from rlaifv_nb.claims import run_claims
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.iconworld import write_prompts
from rlaifv_nb.models import open_llm, open_vlm
from rlaifv_nb.pairs import run_pairs
from rlaifv_nb.sampling import run_sampling

EXAMPLE = Path(__file__).resolve().parent.parent / "data" / "example"


def main():
    """Replace the example by a new one."""
    shutil.rmtree(EXAMPLE, ignore_errors=True)
    at = {name: str(EXAMPLE / name) for name in ("prompts", "01_sampling", "02_claims", "03_feedback", "04_pairs")}
    write_prompts(at["prompts"], {"train": 20, "dev": 4})
    vlm = open_vlm("packaged:iconworld-vlm")
    run_sampling(at["prompts"], at["01_sampling"], vlm, max_new_tokens=128)
    run_claims(at["prompts"], at["01_sampling"], at["02_claims"], open_llm("packaged:iconworld-splitter"))
    run_feedback(at["prompts"], at["01_sampling"], at["02_claims"], at["03_feedback"], vlm)
    run_pairs(at["prompts"], at["01_sampling"], at["02_claims"], at["03_feedback"], at["04_pairs"])


if __name__ == "__main__":
    main()
