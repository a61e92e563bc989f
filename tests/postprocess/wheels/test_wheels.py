"""The dataset of wheels, made from tiny wheels in a folder: pip looks nowhere else."""

import hashlib
import json
import os
import re
import zipfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from postprocess.wheels import build as wheels
from postprocess.wheels import pip
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import write_json
from tests.conftest import ROOT

LINUX = "cp312-cp312-manylinux_2_24_x86_64"
ABI3 = "cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64"


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is all that pip sees, and the lists of wheels and of the image beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(wheels, "WHEELS", tmp_path / "kaggle-wheels.txt")
    monkeypatch.setattr(wheels, "IMAGE", tmp_path / "kaggle-image.txt")
    wheels.IMAGE.write_text("torch==2.10.0\n")
    return folder


def wheel(folder: Path, name: str, version: str, tag: str = LINUX, requires: tuple = (), licence: str = "MIT") -> str:
    """Write a wheel without code; its line in the list."""
    path, info = folder / f"{name}-{version}-{tag}.whl", f"{name}-{version}.dist-info"
    headers = [
        f"Name: {name}",
        f"Version: {version}",
        f"License-Expression: {licence}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.4", *headers, "", "A text."]))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def run(out: Path, *options: str):
    return CliRunner().invoke(wheels.main, ["--out", str(out), *options], catch_exceptions=False)


def refused(out: Path, *options: str) -> str:
    """The one line of a command that ends with exit code 2, leaving no folder and nothing half-made."""
    result = run(out, *options)
    assert result.exit_code == 2, result.output
    [line] = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert not out.exists()
    assert not list(out.parent.glob(".out*"))
    return line


@pytest.fixture
def listed(index):
    """Two wheels, one for every Python 3 from 3.10, the other for 3.12 only, both in the list."""
    lines = [
        wheel(index, "alpha_kit", "1.0", requires=("torch<3,>=2.4", "numpy>=1.17", "beta==2.0")),
        wheel(
            index,
            "beta",
            "2.0",
            ABI3,
            requires=("pandas; extra == 'dev'", "old; python_version < '3.12'", "winapi; os_name == 'nt'"),
        ),
    ]
    wheels.WHEELS.write_text("# a comment\n" + lines[0].replace(" --hash", " \\\n    --hash") + lines[1])
    return index


def test_the_folder_holds_the_wheels_a_manifest_and_kaggles_metadata(listed, tmp_path):
    out = tmp_path / "out"
    result = run(out)
    assert result.exit_code == 0, result.output
    names = ["alpha_kit-1.0-cp312-cp312-manylinux_2_24_x86_64.whl", f"beta-2.0-{ABI3}.whl"]
    assert sorted(path.name for path in out.iterdir()) == [names[0], names[1], "dataset-metadata.json", "wheels.json"]
    assert json.loads((out / "dataset-metadata.json").read_text()) == {
        "title": "pairwise-wheels",
        "id": "INSERT_OWNER/pairwise-wheels",
        "licenses": [{"name": "MIT"}],
    }
    manifest = json.loads((out / "wheels.json").read_text())
    assert manifest["python"] == "3.12"
    assert manifest["platforms"][0] == "manylinux_2_35_x86_64"
    assert {"manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64"} < set(manifest["platforms"])
    for name, version, file, entry in zip(("alpha-kit", "beta"), ("1.0", "2.0"), names, manifest["wheels"], strict=True):
        content = (listed / file).read_bytes()
        assert (out / file).read_bytes() == content
        assert entry == {
            "name": name,
            "version": version,
            "file": file,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "licence": "MIT",
        }


def test_the_wheels_enter_the_ledger_when_they_are_made(listed, tmp_path, ledger_file):
    run(tmp_path / "out")
    run(tmp_path / "out")
    [entry] = ledger.read()
    digest = hashlib.sha256((tmp_path / "out" / "wheels.json").read_bytes()).hexdigest()
    assert (entry["event"], entry["dataset"], entry["manifest"]) == ("package", "pairwise-wheels", digest)
    assert entry["wheels"] == ["alpha-kit 1.0", "beta 2.0"]


def test_each_wheel_its_needs_and_the_next_command_are_printed(listed, tmp_path):
    out = tmp_path / "out"
    digest = hashlib.sha256((listed / f"alpha_kit-1.0-{LINUX}.whl").read_bytes()).hexdigest()
    lines = run(out).output.splitlines()
    at = lines.index(f"alpha_kit-1.0-{LINUX}.whl  0.0 MB  sha256 {digest[:12]}")
    assert lines[at + 1 : at + 4] == [
        "  needs torch<3,>=2.4: 2.10.0 in Kaggle's image",
        "  needs numpy>=1.17: expected in Kaggle's image",
        "  needs beta==2.0: 2.0 in kaggle-wheels.txt",
    ]
    assert not any(name in line for line in lines for name in ("pandas", "old", "winapi"))
    assert f"{out}: 2 of 2 wheels made" in lines
    assert lines[-1] == "next: python -m kaggle_kernels push SPEC, which uploads it for every spec that names it"


def test_a_second_run_downloads_nothing_and_keeps_the_owner(listed, tmp_path):
    out = tmp_path / "out"
    run(out)
    metadata = out / "dataset-metadata.json"
    metadata.write_text(metadata.read_text().replace("INSERT_OWNER", "somebody"))
    stamps = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    for path in listed.iterdir():
        path.unlink()
    result = run(out)
    assert result.exit_code == 0, result.output
    assert f"{out}: up to date" in result.output
    assert "downloading" not in result.output
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == stamps


def test_what_is_not_as_listed_is_made_again(listed, tmp_path):
    out = tmp_path / "out"
    run(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / f"beta-2.0-{ABI3}.whl").write_bytes(b"other")
    result = run(out)
    assert result.exit_code == 0, result.output
    assert f"{out}: 2 of 2 wheels made" in result.output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_folder_is_up_to_date_while_every_byte_is_as_listed(listed):
    pins = wheels.read_pins(wheels.WHEELS, hashed=True)
    write_json(listed / "wheels.json", wheels.manifest(wheels.find_wheels(listed, pins)))
    write_json(listed / "dataset-metadata.json", {"title": "pairwise-wheels"})
    assert wheels.is_current(listed, "pairwise-wheels", pins)
    assert not wheels.is_current(listed, "other-wheels", pins)
    assert not wheels.is_current(listed, "pairwise-wheels", pins[:1])
    assert not wheels.is_current(listed, "pairwise-wheels", [*pins, wheels.Pin("gamma", "1.0", ("0" * 64,))])
    for name in (f"beta-2.0-{ABI3}.whl", "wheels.json", "dataset-metadata.json", "zeta-1.0-py3-none-any.whl"):
        content = (listed / name).read_bytes() if (listed / name).exists() else None
        for damage in (lambda path: path.write_bytes(b"{}"), lambda path: path.unlink()):
            damage(listed / name)
            assert wheels.is_current(listed, "pairwise-wheels", pins) == (content is None and not (listed / name).exists()), (
                name
            )
        if content is not None:
            (listed / name).write_bytes(content)
    assert wheels.is_current(listed, "pairwise-wheels", pins)


def test_a_wheel_that_was_exchanged_together_with_its_manifest_is_not_up_to_date(listed):
    pins = wheels.read_pins(wheels.WHEELS, hashed=True)
    line = wheel(listed, "beta", "2.0", ABI3, requires=("anything",))
    exchanged = [pins[0], wheels.Pin("beta", "2.0", (line.split("sha256:")[1].strip(),))]
    write_json(listed / "wheels.json", wheels.manifest(wheels.find_wheels(listed, exchanged)))
    write_json(listed / "dataset-metadata.json", {"title": "pairwise-wheels"})
    assert wheels.is_current(listed, "pairwise-wheels", exchanged)
    assert not wheels.is_current(listed, "pairwise-wheels", pins)


def test_wheels_that_do_not_install_are_refused(listed, tmp_path, monkeypatch):
    def refuse(folder, packages):
        raise UserError(f"would not install {', '.join(packages)}")

    monkeypatch.setattr(wheels, "dry_run", refuse)
    assert refused(tmp_path / "out") == "error: would not install alpha-kit==1.0, beta==2.0"


def test_wheels_of_several_licences_are_other_to_kaggle(index):
    lines = [
        wheel(index, "alpha", "1.0"),
        wheel(index, "beta", "1.0", licence="Apache-2.0"),
        wheel(index, "gamma", "1.0", licence="Own"),
    ]
    wheels.WHEELS.write_text("".join(lines))
    found = wheels.find_wheels(index, wheels.read_pins(wheels.WHEELS, hashed=True))
    assert [wheels.licence(some) for some in (found[:1], found[1:2], found[2:], found)] == [
        "MIT",
        "apache-2.0",
        "other",
        "other",
    ]


@pytest.mark.parametrize(
    "tag", ["cp311-cp311-manylinux_2_24_x86_64", "cp312-cp312-win_amd64", "cp312-cp312-manylinux_2_36_x86_64"]
)
def test_a_wheel_for_another_python_or_machine_is_refused(index, tmp_path, tag):
    wheels.WHEELS.write_text(wheel(index, "alpha_kit", "1.0", tag))
    assert refused(tmp_path / "out") == (
        f"error: alpha-kit 1.0: there is alpha_kit-1.0-{tag}.whl, not a wheel for Python 3.12 on Linux (x86_64, glibc 2.35); "
        "pin another version in kaggle-wheels.txt"
    )


def test_a_package_that_is_source_only_is_refused(index, tmp_path):
    (index / "alpha-1.0.tar.gz").write_bytes(b"")
    wheels.WHEELS.write_text(f"alpha==1.0 --hash=sha256:{'0' * 64}\n")
    assert refused(tmp_path / "out").startswith(
        "error: alpha 1.0: there is alpha-1.0.tar.gz, not a wheel for Python 3.12 on Linux"
    )


def test_a_version_that_is_not_there_is_refused_and_the_wheels_before_it_are_not_left(listed, tmp_path):
    wheels.WHEELS.write_text(wheels.WHEELS.read_text() + f"gamma==1.0 --hash=sha256:{'0' * 64}\n")
    assert refused(tmp_path / "out") == (
        "error: gamma 1.0: the package index has no such version; mend the pin in kaggle-wheels.txt"
    )


def test_changed_bytes_are_refused(listed, tmp_path):
    changed = listed / f"beta-2.0-{ABI3}.whl"
    changed.write_bytes(changed.read_bytes() + b"\0")
    found = hashlib.sha256(changed.read_bytes()).hexdigest()
    assert refused(tmp_path / "out") == (
        f"error: beta 2.0: its SHA-256 is {found[:12]}…, which kaggle-wheels.txt does not list; the file is not the one that "
        "was pinned: find out why before you change the list"
    )


def test_a_requirement_that_contradicts_the_image_is_refused(index, tmp_path):
    wheels.WHEELS.write_text(wheel(index, "alpha", "1.0", requires=("torch>=2.11",)))
    assert refused(tmp_path / "out") == (
        f"error: alpha-1.0-{LINUX}.whl: needs torch>=2.11, but Kaggle's image has 2.10.0; pin another version of alpha in "
        "kaggle-wheels.txt"
    )


def test_a_requirement_that_contradicts_another_wheel_is_refused(index, tmp_path):
    lines = [wheel(index, "alpha", "1.0", requires=("beta>=3",)), wheel(index, "beta", "2.0")]
    wheels.WHEELS.write_text("".join(lines))
    assert "needs beta>=3, but kaggle-wheels.txt has 2.0; pin another version of alpha" in refused(tmp_path / "out")


def test_an_image_that_has_changed_is_noticed_where_the_folder_is_up_to_date(listed, tmp_path):
    out = tmp_path / "out"
    run(out)
    wheels.IMAGE.write_text("torch==3.1.0\n")
    result = run(out)
    assert result.exit_code == 2
    assert "needs torch<3,>=2.4, but Kaggle's image has 3.1.0" in result.output


def test_a_failure_leaves_the_folder_that_was_there(listed, tmp_path):
    out = tmp_path / "out"
    run(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    wheels.WHEELS.write_text(wheels.WHEELS.read_text() + f"gamma==1.0 --hash=sha256:{'0' * 64}\n")
    assert run(out).exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not list(tmp_path.glob(".out*"))


def test_a_folder_of_something_else_is_not_replaced(listed, tmp_path):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    result = run(out)
    assert result.exit_code == 2
    assert result.output == f"error: --out {out}: holds chapter.txt, which is no wheel; name a folder of its own\n"
    assert (out / "chapter.txt").read_text() == "years of work"


def test_no_network_is_one_line(index, tmp_path, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    wheels.WHEELS.write_text(f"alpha==1.0 --hash=sha256:{'0' * 64}\n")
    assert refused(tmp_path / "out") == (
        "error: alpha 1.0: no connection to the package index; run this where there is a network, or set PIP_INDEX_URL"
    )


def test_a_python_without_pip_is_one_line(listed, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho 'python: No module named pip' >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(pip.sys, "executable", str(bare))
    assert refused(tmp_path / "out") == "error: alpha-kit 1.0: pip could not download it: python: No module named pip"


def test_the_dry_run_takes_wheels_of_kaggles_python_from_the_folder_alone(index, tmp_path):
    wheel(index, "alpha", "1.0")
    pip.dry_run(index, ["alpha==1.0"])
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="would not install alpha==1.0 for Python 3.12 .* No matching distribution found"):
        pip.dry_run(empty, ["alpha==1.0"])
    wheel(empty, "alpha", "1.0", "cp311-cp311-manylinux_2_24_x86_64")
    with pytest.raises(UserError, match="would not install alpha==1.0"):
        pip.dry_run(empty, ["alpha==1.0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha>=1.0 --hash=sha256:" + "0" * 64, "'alpha>=1.0 --hash=sha256:0{64}'; expected NAME==VERSION --hash=sha256:…"),
        ("alpha==1.0", "'alpha==1.0'; expected NAME==VERSION --hash=sha256:…"),
        ("alpha==1.* --hash=sha256:" + "0" * 64, "expected NAME==VERSION"),
        ("alpha==1.0 --hash=md5:00", "expected NAME==VERSION"),
        ("# nothing\n", "lists nothing"),
        (f"a-b==1 --hash=sha256:{'0' * 64}\nA_b==1 --hash=sha256:{'0' * 64}", "a-b is listed twice"),
    ],
)
def test_a_list_that_does_not_pin_is_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        wheels.read_pins(tmp_path / "list.txt", hashed=True)


@pytest.mark.parametrize("slug", ["short", "Pairwise-Wheels", "pairwise--wheels", "p" * 51])
def test_a_slug_that_kaggle_would_refuse_is_refused(listed, tmp_path, slug):
    assert refused(tmp_path / "out", "--slug", slug).startswith(f"error: --slug: '{slug}'; Kaggle takes 6 to 50 of")


def pins_of(path: str) -> dict[str, str]:
    """The versions in a requirements file of this repository."""
    lines = re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)", (ROOT / path).read_text(), flags=re.MULTILINE)
    return {name.lower(): version for name, version in lines}


def test_the_committed_list_pins_what_is_quantised_with_and_what_is_rehearsed_with():
    pins = {pin.name: pin.version for pin in wheels.read_pins(wheels.WHEELS, hashed=True)}
    assert pins["bitsandbytes"] == "0.50.2"
    rehearsed, trained = pins_of("kaggle_kernels/requirements.txt"), pins_of("requirements.txt")
    for name, version in pins.items():
        assert rehearsed[name] == version, name
    assert trained["bitsandbytes"] == pins["bitsandbytes"]


def test_the_images_versions_are_those_of_a_rehearsal_but_for_torch():
    image = {pin.name: pin.version for pin in wheels.read_pins(wheels.IMAGE, hashed=False)}
    assert image == {
        "torch": "2.10.0",
        "transformers": "5.0.0",
        "peft": "0.19.1",
        "accelerate": "1.13.0",
        "tokenizers": "0.22.2",
        "safetensors": "0.7.0",
    }
    rehearsed = pins_of("kaggle_kernels/requirements.txt")
    assert {name: rehearsed[name] for name in image if name != "torch"} == {k: v for k, v in image.items() if k != "torch"}
