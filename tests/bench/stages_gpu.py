"""Every stage of the packaged 7B recipes at full size on one CUDA GPU, random weights: peak memory against
`rlaifv plan`, tokens a second, under caps.

`python tests/bench/stages_gpu.py`; with `--smoke`, the same at toy size on a CPU, to see that it works.
Models are made from their configurations: nothing is downloaded. A stage runs its longest batch once, as the
recipe says; a cap (GB of a card) is the allocator's limit.
"""

import argparse
import gc
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from bench_gpu import GIB, fill_rest, nf4_linear, peak_of, weights_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from workload import print_cells, start_training, step_on_rows

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from full_size_configs import write_configs  # noqa: E402

from rlaifv_nb.dpo import new_adapter  # noqa: E402
from rlaifv_nb.engine import dryrun as dry  # noqa: E402
from rlaifv_nb.engine.models import (
    DTYPES,
    OpenModel,
    keep_4bit_weights_unpacked,
    sharing_of,
    unquantised_modules,
)  # noqa: E402
from rlaifv_nb.engine.packing import n_tokens_of  # noqa: E402
from rlaifv_nb.engine.prefix import next_token_sums, read_prompts, sample_branches  # noqa: E402
from rlaifv_nb.records import package_folder  # noqa: E402
from rlaifv_nb.runner.plan import (
    CARDS,
    MODEL_KEYS,
    Lengths,
    assumed_prompt,
    config_folder,
    instruction_tokens,
    plan_stage,
    read_model,
    stage_parameters,
)  # noqa: E402
from rlaifv_nb.runner.recipes import check_recipe, load_recipe  # noqa: E402

RUNS = {
    "llava15-7b-24gb": 24,
    "llava15-7b-40gb": 40,
    "llava15-7b-80gb": 80,
    "qwen25-vl-7b": 24,
}  # recipe -> the card that it is for
TOY = {
    "01_sampling": {"batch_size": 2, "n_samples": 3, "max_new_tokens": 8},
    "02_claims": {"batch_size": 2, "max_new_tokens": 8},
    "03_feedback": {"batch_size": 1},
    "05_dpo": {"batch_size": 2, "max_tokens": 2048},
}


def open_random(notebook, p, config, device):
    "A model of random weights as the stage would open it; with a new adapter where it trains."
    import bitsandbytes as bnb

    auto = AutoModelForCausalLM if notebook == "02_claims" else AutoModelForImageTextToText
    dtype = torch.float32 if device == "cpu" else DTYPES[p["dtype"]] or torch.bfloat16
    with init_empty_weights():
        model = auto.from_config(config, dtype=dtype, attn_implementation="sdpa")
    torch.manual_seed(0)
    skipped = unquantised_modules(model) if p["quantisation"] == "nf4" else [""]
    for name, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            path = f"{name}.{child}".lstrip(".")
            if (
                "" not in skipped
                and isinstance(layer, nn.Linear)
                and not any(path == s or path.startswith(s + ".") for s in skipped)
            ):
                setattr(module, child, nf4_linear(bnb, layer, device, dtype))
    for module in model.modules():
        fill_rest(module, device, dtype)
    model.is_loaded_in_4bit = p["quantisation"] == "nf4"
    keep_4bit_weights_unpacked(model)
    model = model.to(device).eval()
    vlm = OpenModel(
        model,
        type("Padding", (), {"pad_token_id": 0})(),
        type(model).__name__,
        "",
        p["quantisation"],
        sharing_of(model, True),
    )
    vlm.__dict__["end_id"] = -1  # answers go on to their full length
    return new_adapter(vlm, p["lora_rank"], p["lora_alpha"], 0) if notebook == "05_dpo" else vlm


def work_of(notebook, p, vlm, prompt, lengths, device):
    "What to run, and how many tokens go through the model in it."
    n, seen = p["batch_size"], prompt["input_ids"].shape[1]
    if notebook in ("01_sampling", "02_claims"):
        each = p["n_samples"] if notebook == "01_sampling" else 1
        index, temperature = [k for k in range(n) for _ in range(each)], p.get("temperature", 0)

        def sample():
            sample_branches(
                vlm,
                read_prompts(vlm, [prompt] * n),
                index,
                range(len(index)),
                temperature,
                max_new_tokens=p["max_new_tokens"],
            )

        return sample, n * seen + len(index) * p["max_new_tokens"]
    if notebook == "03_feedback":
        asked = lengths.claims * p["n_samples"]
        index, branches = [k for k in range(n) for _ in range(asked)], [[1] * lengths.claim] * (n * asked)
        return (
            lambda: next_token_sums(vlm, read_prompts(vlm, [prompt] * n), index, branches, ([5], [6]))
        ), n * (seen + asked * lengths.claim)
    if notebook == "05_dpo":
        vlm.model.train()
        if p["gradient_checkpointing"]:
            vlm.model.gradient_checkpointing_enable({"use_reentrant": False})
        row = dry.pair_row(vlm, prompt, p["answer"] + 1, from_pixels=True)
        rows = [row] * max(1, min(n, p["max_tokens"] // n_tokens_of(row)))
        optimizer, reference = start_training(vlm.model), torch.zeros(len(rows), 2, device=device)
        return (
            lambda: step_on_rows(
                vlm, optimizer, rows, reference, "shared" if vlm.sharing_problem else p["layout"], "auto"
            )
        ), sum(map(n_tokens_of, rows))
    raise SystemExit(f"no work for {notebook}")


def measure_stage(notebook, p, recipe, card, lengths, configs, device, cap):
    "A table row: planned and measured GiB of weights and work, tokens a second, or why there are none."
    config, processor, _ = read_model(config_folder(p[MODEL_KEYS[notebook]], configs))
    plan, _ = plan_stage(notebook, p, recipe, card if device == "cuda" else None, lengths, configs)
    vlm = open_random(notebook, p, config, device)
    if notebook == "02_claims":
        prompt = {
            "input_ids": torch.ones(
                1, instruction_tokens(p["facts_prompt"], lengths) + p["answer"], dtype=torch.long
            )
        }
    else:
        dry_model = dry.open_dry(config, type("Padding", (), {"pad_token_id": 0})(), "float32")
        prompt = assumed_prompt(dry_model, lengths)
    run, tokens = work_of(notebook, p, vlm, prompt, lengths, device)
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (cap - 0.6) * GIB / torch.cuda.get_device_properties(0).total_memory)
        )
    found = {
        "planned_weights": plan.weights / GIB,
        "weights": weights_of(vlm.model) / GIB,
        "planned_work": plan.work / GIB,
    }
    try:
        run()
        found["work"] = peak_of(run, device) / GIB
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        found["tokens_per_second"] = tokens / (time.perf_counter() - began)
    except torch.OutOfMemoryError:
        found["note"] = f"out of memory under {cap} GB"
    if device == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0)
    return found


def toy_recipe(recipe, folder):
    "The recipe's models at toy size, as configurations in `folder`."
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    for path in Path(folder).rglob("config.json"):
        config = json.loads(path.read_text())
        text = config.get("text_config", config)
        text |= small | ({"layer_types": ["full_attention"] * 2} if text.get("layer_types") else {})
        if text.get("head_dim"):
            text["head_dim"] = 16
        if "mrope_section" in str(text.get("rope_parameters")):
            text["rope_parameters"]["mrope_section"] = [2, 3, 3]
        if vision := config.get("vision_config"):
            vision |= {k: v for k, v in {"num_hidden_layers": 2, "depth": 2}.items() if k in vision} | (
                {"out_hidden_size": 64, "fullatt_block_indexes": [1]} if "out_hidden_size" in vision else {}
            )
        path.write_text(json.dumps(config))
    return recipe


def main():
    "One table: a line for every stage of every recipe."
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="toy size on a CPU: whether the script works, not how much anything takes",
    )
    parser.add_argument(
        "--recipes", nargs="+", choices=RUNS, help="default: all; with --smoke the two of 24 GB"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-results"))
    a = parser.parse_args()
    if not a.smoke and not torch.cuda.is_available():
        raise SystemExit(
            "This benchmark needs a CUDA GPU and there is none here; --smoke runs the same at toy size on a "
            "CPU."
        )
    device, lengths, found = "cpu" if a.smoke else "cuda", Lengths(), {}
    cells = [("recipe", "stage", "weights, GiB", "planned", "work, GiB", "planned", "tokens/s", "")]
    with tempfile.TemporaryDirectory() as configs:
        write_configs(configs)
        for name in a.recipes or (["llava15-7b-24gb", "qwen25-vl-7b"] if a.smoke else RUNS):
            recipe = check_recipe(load_recipe(name), package_folder("nbs"))
            recipe = toy_recipe(recipe, configs) if a.smoke else recipe
            for notebook, p in stage_parameters(recipe, package_folder("nbs")).items():
                p = p | TOY[notebook] | {"answer": 16} if a.smoke else p
                r = found.setdefault(name, {})[notebook] = measure_stage(
                    notebook, p, recipe, CARDS[RUNS[name]], lengths, configs, device, RUNS[name]
                )
                columns = ("weights", "planned_weights", "work", "planned_work", "tokens_per_second")
                numbers = [f"{r[key]:.3g}" if key in r else "" for key in columns]
                cells.append(
                    (
                        name,
                        notebook,
                        *numbers,
                        r.get("note", ""),
                    )
                )
                print(*cells[-1], sep="  ", flush=True)
                gc.collect()
                if device == "cuda":
                    torch.cuda.empty_cache()
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "stages_gpu.json").write_text(json.dumps({"smoke": a.smoke, "recipes": found}, indent=1) + "\n")
    print_cells(cells)
    if a.smoke:
        print("smoke run, figures mean nothing")


if __name__ == "__main__":
    main()
