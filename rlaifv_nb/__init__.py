"""RLAIF-V in notebooks: sample, divide, verify, pair, train, evaluate. Each module is exported from a notebook.

What one needs to build with it can be imported from here, and is loaded only then (`import rlaifv_nb` is fast):

- rows and tables: `Prompt`, `Response`, `Claim`, `Verdict`, `Pair`, `read_table`, `write_table`
- models and pictures: `open_vlm`, `open_llm`, `load_image`
- the seven stages: `run_sampling`, `run_claims`, `run_feedback`, `run_pairs`, `run_dpo`, `run_evaluation`,
  `run_guided_decoding`; one answer, best of N: `guided_answer`
- whole runs: `load_recipe`, `run_chain`, `write_report`
- to and from elsewhere: `import_prompts`, `export_run`, `from_official`, `to_official`, `to_rlaifv_dataset`,
  `to_trl_dataset`, `merge_adapter`
- is one model better than another, on the same items: `compare_models`
"""

from importlib import import_module

__version__ = "0.1.0"

# Module -> what is taken from it.
_EXPORTS = {
    "records": ("Prompt", "Response", "Claim", "Verdict", "Pair", "read_table", "write_table"),
    "engine.models": ("open_vlm", "open_llm"),
    "engine.pictures": ("load_image",),
    "sampling": ("run_sampling",),
    "claims": ("run_claims",),
    "feedback": ("run_feedback",),
    "pairs": ("run_pairs",),
    "dpo": ("run_dpo",),
    "evaluation": ("run_evaluation",),
    "guided_decoding": ("run_guided_decoding", "guided_answer"),
    "runner.recipes": ("load_recipe",),
    "runner.chain": ("run_chain",),
    "runner.report": ("write_report",),
    "exchange.inputs": ("import_prompts",),
    "exchange.official": ("from_official", "to_official"),
    "exchange.public": ("export_run", "to_rlaifv_dataset", "to_trl_dataset", "merge_adapter"),
    "benchmarks.intervals": ("compare_models",),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name):
    "Imports a name's module when the name is first used."
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    "All names, loaded or not."
    return sorted({*globals(), *_MODULE_OF})
