"""What keeps a run from starting is found before its first stage: models that cannot be had or opened,
drivers, devices, disks.

The Hub is a local server that answers as the real one does; `huggingface_hub` itself is the real one."""

import hashlib
import json
import shutil
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub import constants

from rlaifv_nb.engine.models import MODEL_FILES, processor_problem
from rlaifv_nb.engine.pictures import torchvision_for
from rlaifv_nb.records import package_folder
from rlaifv_nb.runner import machine
from rlaifv_nb.runner.command import main
from rlaifv_nb.runner.machine import check_machine, device_problem, find_model, look_at_machine, wanted_models
from rlaifv_nb.runner.recipes import RecipeError, load_recipe, plan_run

VLM, SPLITTER = package_folder("data") / "iconworld-vlm", package_folder("data") / "iconworld-splitter"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A Hub with the models in `models` (id -> folder). Those in `gated` refuse everything but their
    listing; `sizes` overrides what files weigh."""

    def __init__(self, models, gated=(), sizes=None):
        self.models, self.gated, self.sizes, self.asked = models, gated, sizes or {}, []
        super().__init__(("127.0.0.1", 0), HubRequest)
        Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class HubRequest(BaseHTTPRequestHandler):
    """The three kinds of request that `snapshot_download` makes: a model's information, its tree, a file."""

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content_Length": str(len(body)), "X_Repo_Commit": SHA} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        hub.asked.append(f"{self.command} {path}")
        parts = path.removeprefix("api/models/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if name not in hub.models:
            return self.answer(
                401, X_Error_Code="RepoNotFound", X_Error_Message="Invalid username or password."
            )
        files = {f.name: f for f in sorted(Path(hub.models[name]).iterdir()) if f.is_file()}

        def size(f):
            return hub.sizes.get(f.name, f.stat().st_size)

        if path.startswith("api/") and rest[0] == "revision":
            return self.json(
                {
                    "id": name,
                    "sha": SHA,
                    "siblings": [{"rfilename": f} for f in files],
                    "private": False,
                    "gated": name in hub.gated,
                }
            )
        if name in hub.gated:
            return self.answer(
                403, X_Error_Code="GatedRepo", X_Error_Message=f"Access to model {name} is restricted."
            )
        if rest[0] == "tree":
            return self.json(
                [
                    {
                        "type": "file",
                        "path": f.name,
                        "size": size(f),
                        "oid": hashlib.sha1(f.read_bytes()).hexdigest(),
                    }
                    for f in files.values()
                ]
            )
        file = files.get(rest[2])
        if file is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body = file.read_bytes()
        length = str(size(file) if self.command == "HEAD" else len(body))
        self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', Content_Length=length)

    do_HEAD = do_GET

    def json(self, value):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function that puts a Hub in the place of the real one, with an empty cache."""
    hubs = []

    def open_hub(models=None, **options):
        hubs.append(Hub(models or {}, **options))
        monkeypatch.setattr(constants, "ENDPOINT", hubs[-1].url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hubs[-1].url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        return hubs[-1]

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield open_hub
    for opened in hubs:
        opened.shutdown()


def recipe_of(**models):
    return replace(load_recipe("tiny"), **models)


def problems_of(recipe, device="auto"):
    return look_at_machine(plan_run(recipe), device).problems


# models


def test_every_model_of_a_recipe_is_looked_at_once():
    names = [(m.name, m.is_vlm) for m in wanted_models(plan_run(load_recipe("llava15-7b-24gb")))]
    assert names == [
        ("llava-hf/llava-1.5-7b-hf", True),
        ("meta-llama/Meta-Llama-3-8B-Instruct", False),
        ("llava-hf/llava-v1.6-34b-hf", True),
    ]
    assert [m.name for m in wanted_models(plan_run(load_recipe("tiny")))] == [
        "packaged:iconworld-vlm",
        "packaged:iconworld-splitter",
    ]


def test_the_small_files_are_downloaded_and_the_weights_are_weighed(hub, tmp_path):
    opened = hub({"some-one/seer": VLM})
    folder, to_download = find_model("some-one/seer")
    weights = (VLM / "model.safetensors").stat().st_size
    assert (
        to_download >= weights
        and not (folder / "model.safetensors").exists()
        and (folder / "config.json").is_file()
    )
    assert not any(line.startswith("GET") and line.endswith("safetensors") for line in opened.asked)
    again, to_download = find_model("some-one/seer")
    assert again == folder and to_download == weights, "what is in the cache is not counted"
    assert problems_of(recipe_of(policy="some-one/seer")) == ()


def test_a_gated_splitter_is_told_before_sampling(hub):
    opened = hub({"big-labs/llama": SPLITTER}, gated=["big-labs/llama"])
    (problem,) = problems_of(recipe_of(splitter="big-labs/llama"))
    assert problem.startswith(
        f"big-labs/llama is gated: accept its terms at {opened.url}/big-labs/llama, "
        "then log in with `hf auth login`"
    )


@pytest.mark.parametrize("key", ["policy", "splitter", "labeler"])
def test_an_unknown_model_is_named_whichever_it_is(hub, key):
    opened = hub()
    (problem,) = problems_of(recipe_of(**{key: "some-one/typo"}))
    assert (
        "there is no model some-one/typo on the Hub, or it is private: "
        f"check its name at {opened.url}/some-one/typo" in problem
    )


def test_all_that_is_wrong_is_said_at_once_in_one_line(hub, capsys):
    hub({"a/gated": SPLITTER}, gated=["a/gated"])
    recipe = recipe_of(policy="a/typo", splitter="a/gated", labeler="not a name")
    with pytest.raises(RecipeError) as e:
        check_machine(recipe, plan_run(recipe))
    text = str(e.value)
    assert text.startswith("tiny cannot start: ") and text.count("; also: ") == 2 and "\n" not in text
    assert all(part in text for part in ("a/typo", "a/gated is gated", "not a name is neither a folder nor"))


def test_without_the_hub_a_full_cache_will_do_and_half_of_one_will_not(hub, monkeypatch):
    from huggingface_hub import snapshot_download

    opened = hub({"some-one/seer": VLM, "some-one/other": VLM})
    snapshot_download("some-one/seer", allow_patterns=list(MODEL_FILES))
    find_model("some-one/other")  # the small files alone
    opened.shutdown()
    opened.server_close()
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        assert problems_of(recipe_of(policy="some-one/seer")) == ()
        (problem,) = problems_of(recipe_of(policy="some-one/other", labeler="some-one/third"))
        assert (
            "cannot be reached" in problem
            and "`hf download some-one/other` and `hf download some-one/third` beforehand" in problem
        )


def test_a_gated_model_that_is_in_the_cache_will_do(hub):
    from huggingface_hub import snapshot_download

    hub({"big-labs/llama": SPLITTER})
    snapshot_download("big-labs/llama", allow_patterns=list(MODEL_FILES))
    hub({"big-labs/llama": SPLITTER}, gated=["big-labs/llama"])
    assert problems_of(recipe_of(splitter="big-labs/llama")) == ()


def test_a_folder_or_a_model_of_the_hub_without_safetensors_is_refused(hub, tmp_path):
    shutil.copytree(VLM, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    (problem,) = problems_of(recipe_of(policy=str(tmp_path / "bare")))
    assert problem.endswith("bare lacks model.safetensors: it needs its weights as safetensors")
    hub({"some-one/old": tmp_path / "bare"})
    (problem,) = problems_of(recipe_of(policy="some-one/old"))
    assert "has no weights as safetensors on the Hub" in problem


def test_no_space_for_the_download(hub):
    hub({"some-one/large": VLM, "some-one/splitter": SPLITTER}, sizes={"model.safetensors": 4 * 10**15})
    (problem,) = problems_of(
        recipe_of(policy="some-one/large", splitter="some-one/splitter", labeler="policy")
    )
    assert problem.startswith(
        "8000000.0 GB are still to be downloaded "
        "(some-one/large 4000000.0 GB, some-one/splitter 4000000.0 GB), and "
    )
    assert "free: make room, or set HF_HOME" in problem


# processors


@pytest.fixture
def no_processor(monkeypatch):
    """A function after which no processor opens, for want of a package."""

    def put(message):
        def missing(*args, **kwargs):
            raise ImportError(message)

        processor_problem.cache_clear()
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", missing)

    yield put
    processor_problem.cache_clear()


def test_a_processor_that_needs_a_package(no_processor):
    no_processor("This processor requires\nthe beans library")
    (problem,) = problems_of(load_recipe("tiny"))
    assert (
        problem
        == "packaged:iconworld-vlm: its processor cannot be opened: This processor requires the beans library"
    )


@pytest.mark.parametrize(
    "message, package",
    [
        (
            transformers.utils.import_utils.TORCHVISION_IMPORT_ERROR.format("Qwen2VLVideoProcessor"),
            "torchvision",
        ),
        (
            "Package `num2words` is required to run SmolVLM processor. "
            "Install it with `pip install num2words`.",
            "num2words",
        ),
    ],
)
def test_the_package_that_real_processors_need_is_named_with_its_version(no_processor, message, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed, so nothing is missing")
    no_processor(message)
    (problem,) = problems_of(load_recipe("tiny"))
    assert (
        f"its processor needs {package} for videos" in problem
        and f"pip install torchvision=={torchvision_for(torch.__version__)}" in problem
    )
    assert "\n" not in problem


def test_qwens_own_processor_says_so(tmp_path):
    from published_models import save_published

    if find_spec("torchvision"):
        pytest.skip("torchvision is installed, so nothing is missing")
    save_published("qwen25_vl", tmp_path)
    (tmp_path / "processor_config.json").unlink()
    published = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    stand_ins = transformers.models.auto.processing_auto.PROCESSOR_MAPPING._extra_content
    kept = dict(stand_ins)
    stand_ins.clear()
    try:
        (problem,) = problems_of(recipe_of(policy=str(tmp_path)))
    finally:
        stand_ins.update(kept)
    assert problem.startswith(f"{tmp_path}: its processor needs torchvision for videos")


def test_a_torchvision_that_does_not_fit_is_found_before_transformers_is_asked(monkeypatch):
    monkeypatch.setattr(
        "rlaifv_nb.engine.pictures.torchvision_problem",
        lambda: "torchvision 0.2 does not work with PyTorch 2.13",
    )
    assert problems_of(recipe_of(policy="some-one/typo")) == (
        "torchvision 0.2 does not work with PyTorch 2.13",
    )


@pytest.mark.parametrize(
    "file, text, says",
    [
        ("config.json", "{", "its small files cannot be opened"),
        ("config.json", '{"model_type": "no_such"}', "its small files cannot be opened"),
        ("chat_template.jinja", None, "it has no chat template"),
        (
            "config.json",
            '{"model_type": "llama"}',
            "its architecture llama is not one of a vision-language model",
        ),
    ],
)
def test_a_folder_that_cannot_be_opened(tmp_path, file, text, says):
    shutil.copytree(VLM, tmp_path / "model")
    (tmp_path / "model" / file).unlink()
    if text is not None:
        (tmp_path / "model" / file).write_text(text)
    (problem,) = problems_of(recipe_of(policy=str(tmp_path / "model")))
    assert says in problem and str(tmp_path / "model") in problem and "\n" not in problem


# devices


@pytest.fixture
def card(monkeypatch):
    """A function that makes this machine one with a card, a CUDA build of PyTorch and a driver; CUDA never
    works."""

    def put(cuda="13.0", driver="535.104.05", there=True):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(machine, "has_nvidia_card", lambda: there)
        monkeypatch.setattr(machine, "driver_version", lambda: driver)

    return put


LARGE, SMALL = {"some-one/7b": 7 * 10**9}, {"packaged:iconworld-vlm": 10**6}


@pytest.mark.parametrize(
    "cuda, driver, says",
    [
        (
            "13.0",
            "535.104.05",
            "was built for CUDA 13.0, which needs NVIDIA's driver 580 or newer, "
            "and this machine has 535.104.05: update the driver",
        ),
        ("13.0", "535.104.05", "a build for CUDA 12.6 (driver 525 or newer): the page"),
        ("12.6", "470.82", "needs NVIDIA's driver 525 or newer"),
        ("13.0", "580.65.06", "cannot use the graphics card (driver 580.65.06): `nvidia-smi` must run"),
        ("13.0", "", "cannot use the graphics card (driver not found)"),
        (None, "580.65.06", "was built without CUDA"),
    ],
)
def test_a_card_that_cuda_cannot_use(card, cuda, driver, says):
    card(cuda, driver)
    for device, sizes in (("auto", LARGE), ("cuda", SMALL)):
        text, stops = device_problem(device, sizes)
        assert stops and says in text
    text, stops = device_problem("auto", SMALL)
    assert says in text and not stops, "small models run on the CPU, and it is said"
    assert device_problem("cpu", LARGE) == ("", False)


def test_billions_of_weights_do_not_start_on_a_cpu_unless_told_to(card):
    card(None, "", there=False)
    text, stops = device_problem("auto", LARGE | SMALL)
    assert stops and text.startswith(
        "some-one/7b (7.0 billion weights): too large for a CPU, and this machine has no CUDA device. "
        "`device: cpu` in the recipe"
    )
    assert device_problem("auto", SMALL) == ("", False) and device_problem("cpu", LARGE) == ("", False)
    text, stops = device_problem("cuda", SMALL)
    assert stops and text == "the recipe says `device: cuda`, but this machine has no CUDA device"


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_who_hides_the_cards_wants_the_cpu(card, monkeypatch, hidden):
    card()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert "CUDA_VISIBLE_DEVICES hides all graphics cards" in device_problem("auto", LARGE)[0]
    assert device_problem("auto", SMALL)[1] is False


def test_with_cuda_there_is_nothing_to_say(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_problem("auto", LARGE) == device_problem("cuda", LARGE) == ("", False)


def test_weights_are_counted_without_loading_them(card, tmp_path):
    from transformers import AutoConfig

    card(None, "", there=False)
    shutil.copytree(VLM, tmp_path / "large")
    config = AutoConfig.from_pretrained(tmp_path / "large")
    config.text_config.intermediate_size = 3_000_000
    config.save_pretrained(tmp_path / "large")
    (problem,) = problems_of(recipe_of(policy=str(tmp_path / "large")))
    assert "billion weights): too large for a CPU" in problem
    assert problems_of(recipe_of(policy=str(tmp_path / "large")), device="cpu") == ()


@pytest.mark.parametrize(
    "proc, smi, version",
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"
            "GCC version:  gcc version 12.3.0",
            None,
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs)",
            None,
            "580.65.06",
        ),
        (None, "550.90\n", "550.90"),
        (None, None, ""),
    ],
)
def test_the_drivers_version(monkeypatch, proc, smi, version):
    def read(path, *args, **kwargs):
        if proc is None:
            raise FileNotFoundError(path)
        return proc

    def run(command, **kwargs):
        if smi is None:
            raise FileNotFoundError(command[0])
        return SimpleNamespace(stdout=smi)

    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(read_text=lambda: read(path)))
    monkeypatch.setattr(machine.subprocess, "run", run)
    assert machine.driver_version() == version


# the commands


def own_recipe(folder, **changes):
    import yaml

    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"extends": "tiny", "name": "mine"} | changes))
    return str(path)


def test_run_and_plan_say_it_before_anything_starts(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub({"big-labs/llama": SPLITTER}, gated=["big-labs/llama"])
    path = own_recipe(tmp_path, splitter="big-labs/llama")
    assert main(["run", path]) == 2
    err = capsys.readouterr().err
    assert err.startswith("rlaifv: mine cannot start: big-labs/llama is gated") and err.count("\n") == 1
    assert not list(tmp_path.glob("runs/mine/*/*")), "nothing was made"
    assert main(["plan", path]) == 2
    assert "big-labs/llama is gated" in capsys.readouterr().err


def test_plan_shows_what_would_stop_a_run_and_plans_all_the_same(no_processor, capsys):
    no_processor("no beans")
    assert main(["plan", "tiny"]) == 0
    out = capsys.readouterr().out
    assert (
        "01_sampling" in out
        and "before `rlaifv run` can start: packaged:iconworld-vlm: its processor cannot be opened: no beans"
        in out
    )


def test_a_plan_for_another_card_does_not_ask_for_one_here(card, capsys):
    card(None, "", there=False)
    assert main(["plan", "tiny", "--gpu", "24"]) == 0
    assert "before `rlaifv run` can start" not in capsys.readouterr().out
