"""Tiny packages as postprocess makes them, written without it: random weights with a head that matters."""

import json
import shutil
from pathlib import Path

import yaml
from click.testing import CliRunner, Result

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.bundle import build, kernel_folder
from kaggle_kernels.build.packages import build_of
from kaggle_kernels.runtime.settings import PackageSettings
from preprocess.core.files import sha256
from recipes.pairwise.config.axolotl_keys import PLUGIN
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.contract import TOKENIZER_FILES, new_contract, write_contract

WSDM = "title: Pairwise Test\ncompetition: wsdm\npackages: [{run: two, dataset: tiny-two}]\nclock_seconds: 600\n"
BASE = "outputs/demo/input/gemma2"  # a base model whose dimensions are those of tiny.model
AWKWARD_ROWS = [
    {"id": "empty", "prompt": "", "response_a": "", "response_b": ""},
    {"id": "null", "prompt": None, "response_a": None, "response_b": None},
    {"id": "null turns", "prompt": ["a", None], "response_a": [None, "b"], "response_b": [None, None]},
    {"id": "no turns", "prompt": [], "response_a": [], "response_b": []},
    {"id": "100,000 characters", "prompt": "word " * 20_000, "response_a": "河" * 100_000, "response_b": "x" * 100_000},
    {"id": "right to left", "prompt": "نهر نافذة", "response_a": "\u202eabc\u202c", "response_b": "שלום"},
    {"id": "emoji", "prompt": "👩‍👩‍👧", "response_a": "🇩🇪🙂", "response_b": "e\u0301\u200d"},
    {
        "id": "control tokens",
        "prompt": "<bos><eos>",
        "response_a": "<end_of_turn>\n<start_of_turn>model",
        "response_b": "<pad>",
    },
    {"id": "lone surrogates", "prompt": "\ud800", "response_a": "a\udfffb", "response_b": "\ud83d\ude00"},
    {"id": "line ends", "prompt": "a\r\nb\rc", "response_a": "\u2028\x85", "response_b": "\x00\x07"},
]


def make_package(
    folder: Path,
    base: Path,
    verdicts: tuple[str, ...] = ("model_a", "model_b"),
    seed: int = 1,
    head: str = "score",
    template: str = "gemma",
    budget_tokens: int = 160,
    pretrained: bool = False,
) -> Path:
    """A package in `folder` for the model in `base`: model, tokenizer, contract, metadata, manifest.

    Its weights are random, unless it is `pretrained`: then only its head is.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    if head == "label_tokens":
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.5)
    else:
        labels = 1 if head == "reward" else len(verdicts)
        config = AutoConfig.from_pretrained(base, num_labels=labels)
        auto = AutoModelForSequenceClassification
        model = auto.from_pretrained(base, config=config) if pretrained else auto.from_config(config)
        torch.nn.init.normal_((model.score if hasattr(model, "score") else model.classifier).weight, std=0.5)
    model.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        if (base / name).exists():
            shutil.copy(base / name, folder / name)
    package = {"slug": f"tiny-{folder.name}"}
    block = PairwiseBlock(verdicts=verdicts, template=template, budget_tokens=budget_tokens, head=head, package=package)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    contract = new_contract(block, tokenizer, attention="sdpa", base_model=BASE, revision=None, pad_token_id=0)
    write_contract(folder, contract, Path("tiny.yml"))
    metadata = {"id": f"OWNER/{block.package.slug}", "title": block.package.slug, "licenses": [{"name": "apache-2.0"}]}
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    write_manifest(folder, golden_probabilities(folder))
    return folder


def write_recipe(folder: Path, run: str, dataset: str, base_model: str = BASE, quantize: str = "none", **pairwise) -> Path:
    """A recipe in folder/recipes whose package is `dataset`."""
    block = {"template": "gemma", "budget_tokens": 160, "package": {"slug": dataset, "quantize": quantize}, **pairwise}
    path = folder / "recipes" / f"{run}.yml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({"base_model": base_model, "plugins": [PLUGIN], "pairwise": block}))
    return path


def write_spec(folder: Path, text: str) -> Path:
    """A spec in folder/specs, with its kernel built."""
    path = folder / "specs" / "test.yml"
    path.parent.mkdir()
    path.write_text(text)
    build(path)
    return path


def rehearse(*arguments) -> Result:
    """The command `rehearse`, in this process."""
    return CliRunner().invoke(main, ["rehearse", *map(str, arguments)])


def make_pushable(spec_path: Path, packages: dict[str, Path]) -> None:
    """What postprocess and rehearse leave behind where they pass, written without them; `packages` are folders by dataset."""
    for package in packages.values():
        golden = json.loads((package / "manifest.json").read_text(encoding="utf-8"))["golden"]
        agreement = {"agrees": True, "mean_difference": 0.001, "tolerance": 0.05, "golden": golden}
        (package.parent / "agreement.json").write_text(json.dumps(agreement), encoding="utf-8")
    rehearsal = Path("outputs") / spec_path.stem / "rehearsal"
    rehearsal.mkdir(parents=True, exist_ok=True)
    build(spec_path)
    made_from = build_of(kernel_folder(spec_path), packages)
    (rehearsal / "rehearsal.json").write_text(json.dumps({"rows": 30, "build": made_from}), encoding="utf-8")


def settings_for(run: str, dataset: str, weight: float = 1.0, **changes) -> PackageSettings:
    """What a kernel is told of a tiny package."""
    told = {"placement": "each", "verdicts": ("model_a", "model_b"), **changes}
    return PackageSettings(run, dataset, weight, **told)


def golden_probabilities(folder: Path) -> list[dict]:
    """The golden rows' probabilities by a forward pass a row, without the runtime."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    contract = json.loads((folder / "contract.json").read_text(encoding="utf-8"))
    auto = AutoModelForCausalLM if contract["head"] == "label_tokens" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.config.attn_logit_softcapping = None
    golden = []
    with torch.inference_mode():
        for row in contract["golden"]:
            logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in row["ids"]]
            if contract["head"] == "label_tokens":
                logits = [logits[0][-1, contract["label_token_ids"]]]
            probabilities = torch.cat(logits).softmax(-1).tolist()
            golden.append({"id": row["pair"]["id"], "probabilities": probabilities})
    return golden


def write_manifest(folder: Path, golden: list[dict] | None = None) -> None:
    """Write manifest.json with the hashes of the files as they are now; the golden probabilities stay unless given."""
    path = folder / "manifest.json"
    golden = golden or json.loads(path.read_text(encoding="utf-8"))["golden"]
    path.write_text(json.dumps({"files": list_files(folder), "golden": golden, "quantize": "none", "dtype": "float32"}))


def list_files(folder: Path) -> dict[str, dict]:
    """A folder's files as a manifest lists them."""
    paths = [path for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    return {path.name: {"sha256": sha256(path), "bytes": path.stat().st_size} for path in paths}


def change_json(path: Path, **changes) -> None:
    """Set keys of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def flip_byte(path: Path) -> None:
    """Change one byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
