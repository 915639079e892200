"""The seven stages on a handful of icon scenes, each as one call; run as a script so that a test can kill
it."""

import sys
from functools import partial
from pathlib import Path

from rlaifv_nb.iconworld.world import write_prompts

POLICY, SPLITTER = "packaged:iconworld-vlm", "packaged:iconworld-splitter"
TABLES = {
    "01_sampling": ["responses"],
    "02_claims": ["claims"],
    "03_feedback": ["verdicts"],
    "04_pairs": ["pairs"],
    "05_dpo": ["reference", "training"],
    "06_evaluation": ["scores", "cases-0", "cases-1"],
    "07_guided_decoding": ["candidates-base", "candidates-aligned", "choices"],
}


def prepare(inputs):
    "Prompts for all stages."
    if not (Path(inputs) / "prompts").exists():
        write_prompts(Path(inputs) / "prompts", {"train": 14, "dev": 4})


def run_stage(stage, inputs, out):
    "Runs one stage with its inputs from the run folder `inputs`."
    at = {name: str(Path(inputs) / name) for name in ("prompts", *TABLES)}
    if stage == "01_sampling":
        from rlaifv_nb.engine.models import open_vlm
        from rlaifv_nb.sampling import SamplingOptions, run_sampling

        run_sampling(
            at["prompts"],
            out,
            open_vlm(POLICY),
            options=SamplingOptions(n_samples=6, max_new_tokens=100, batch_size=3),
            shard_size=3,
        )
    elif stage == "02_claims":
        from rlaifv_nb.claims import run_claims
        from rlaifv_nb.engine.models import open_llm

        run_claims(at["prompts"], at["01_sampling"], out, open_llm(SPLITTER), shard_size=20)
    elif stage == "03_feedback":
        from rlaifv_nb.engine.models import open_vlm
        from rlaifv_nb.feedback import FeedbackOptions, run_feedback

        run_feedback(
            at["prompts"],
            at["01_sampling"],
            at["02_claims"],
            out,
            open_vlm(POLICY),
            options=FeedbackOptions(batch_size=3),
            shard_size=3,
        )
    elif stage == "04_pairs":
        from rlaifv_nb.pairs import run_pairs

        run_pairs(at["prompts"], at["01_sampling"], at["02_claims"], at["03_feedback"], out)
    elif stage == "05_dpo":
        from rlaifv_nb.dpo import DpoOptions, run_dpo
        from rlaifv_nb.engine.models import open_vlm

        run_dpo(
            at["prompts"],
            at["04_pairs"],
            out,
            partial(open_vlm, POLICY, quantisation="nf4"),
            options=DpoOptions(learning_rate=5e-4, epochs=3.0, batch_size=4, evaluations=6),
        )
    elif stage == "06_evaluation":
        from rlaifv_nb.evaluation import run_evaluation

        run_evaluation(
            out, POLICY, f"aligned={at['05_dpo']}/adapter", n_scenes=30, batch_size=5, shard_size=5
        )
    elif stage == "07_guided_decoding":
        from rlaifv_nb.guided_decoding import run_guided_decoding

        run_guided_decoding(
            at["prompts"],
            out,
            POLICY,
            f"{at['05_dpo']}/adapter",
            n_candidates=4,
            temperature=0.9,
            max_new_tokens=100,
            batch_size=3,
            shard_size=3,
        )
    else:
        raise ValueError(f"unknown stage {stage!r}: choose one of {', '.join(TABLES)}")


if __name__ == "__main__":
    run_stage(*sys.argv[1:])
