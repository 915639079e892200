"""Make data/example/: a small real run of stages 01 to 04 on the icon world, and candidates of the aligned
policy with their rewards.

The notebooks use them by default.

    python scripts/make_example.py

"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from rlaifv_nb.claims import run_claims
from rlaifv_nb.engine.models import open_llm, open_vlm
from rlaifv_nb.feedback import run_feedback
from rlaifv_nb.guided_decoding import run_guided_decoding
from rlaifv_nb.iconworld.world import write_prompts
from rlaifv_nb.pairs import run_pairs
from rlaifv_nb.sampling import SamplingOptions, run_sampling

EXAMPLE = Path(__file__).resolve().parent.parent / "data" / "example"
POLICY, ADAPTER = "packaged:iconworld-vlm", "packaged:iconworld-aligned"


def make_candidates(prompts, out):
    """Ten answers of the aligned policy to each prompt, scored by it and by the base model."""
    with TemporaryDirectory() as responses:
        run_sampling(
            prompts,
            responses,
            open_vlm(POLICY, ADAPTER),
            options=SamplingOptions(max_new_tokens=128, round=2),
        )
        run_guided_decoding(prompts, out, POLICY, ADAPTER, responses=responses)


def main():
    """Replace the example by a new one."""
    shutil.rmtree(EXAMPLE, ignore_errors=True)
    at = {
        name: str(EXAMPLE / name)
        for name in ("prompts", "01_sampling", "02_claims", "03_feedback", "04_pairs", "07_guided_decoding")
    }
    write_prompts(at["prompts"], {"train": 20, "dev": 4})
    vlm = open_vlm(POLICY)
    run_sampling(at["prompts"], at["01_sampling"], vlm, options=SamplingOptions(max_new_tokens=128))
    run_claims(at["prompts"], at["01_sampling"], at["02_claims"], open_llm("packaged:iconworld-splitter"))
    run_feedback(at["prompts"], at["01_sampling"], at["02_claims"], at["03_feedback"], vlm)
    run_pairs(at["prompts"], at["01_sampling"], at["02_claims"], at["03_feedback"], at["04_pairs"])
    make_candidates(at["prompts"], at["07_guided_decoding"])


if __name__ == "__main__":
    main()
