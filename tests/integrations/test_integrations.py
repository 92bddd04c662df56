"""Steps of other tools' pipelines, against those tools."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import lindep_onnx
from lindep_onnx.runtime.backend import Runtime

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "models" / "demo.onnx"
OPTIONS: dict[str, Any] = {"params": 0.5, "refit": "fold"}


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return {name: value[:60] for name, value in np.load(ROOT / "models" / "calib.npz").items()}


@pytest.fixture(scope="module")
def expected(data: dict[str, np.ndarray]) -> onnx.ModelProto:
    return lindep_onnx.compress(MODEL, data, **OPTIONS).model


def outputs(model: Any, data: dict[str, np.ndarray]) -> np.ndarray:
    session = Runtime(threads=1).open(model)
    return np.asarray(session.run(None, data)[0])


def test_the_package_imports_none_of_them() -> None:
    code = "import sys, lindep_onnx; print(sorted({'onnx_ir', 'olive'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    # graphsurgeon and onnx themselves may import onnx_ir one day; Olive is nobody's business.
    assert "olive" not in found.stdout


def test_an_onnx_ir_pass_gives_what_compress_gives(data: dict[str, np.ndarray], expected: onnx.ModelProto) -> None:
    ir = pytest.importorskip("onnx_ir")
    import onnx_ir.passes.common as common

    from lindep_onnx.integrations.onnx_ir import CompressPass

    model = ir.from_proto(onnx.load(MODEL))
    common.RemoveUnusedNodesPass()(model)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    step = CompressPass(data, **OPTIONS)
    result = ir.passes.Sequential(step, common.CheckerPass())(model)
    assert result.modified and step.report is not None and step.report.changed
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    np.testing.assert_array_equal(outputs(ir.to_proto(result.model), data), outputs(expected, data))


def test_an_onnx_ir_pass_that_removes_nothing_says_so(data: dict[str, np.ndarray]) -> None:
    ir = pytest.importorskip("onnx_ir")
    from lindep_onnx.integrations.onnx_ir import CompressPass

    model = ir.from_proto(onnx.load(MODEL))
    assert not CompressPass(data, params=1.0, exclude=("*",))(model).modified
    with pytest.raises(lindep_onnx.UsageError, match="nonsense"):
        CompressPass(data, nonsense=1)(model)


@pytest.mark.parametrize("calibration", ["path", "data_config"])
def test_an_olive_workflow_runs_the_pass(
    tmp_path: Path, data: dict[str, np.ndarray], expected: onnx.ModelProto, calibration: str
) -> None:
    workflows = pytest.importorskip("olive.workflows")
    from lindep_onnx.integrations.olive import package_config

    np.savez(tmp_path / "calib.npz", **data)
    step: dict[str, Any] = {"type": "LindepCompression", "options": OPTIONS, "report": str(tmp_path / "report.html")}
    if calibration == "path":
        step["calib"] = str(tmp_path / "calib.npz")
    else:
        script = tmp_path / "loader.py"
        script.write_text(
            "import numpy as np\nfrom olive.data.registry import Registry\n\n"
            "@Registry.register_dataset()\ndef images(data_dir, **kwargs):\n"
            "    data = np.load(data_dir)\n"
            "    return [({k: data[k][i] for k in data.files}, 0) for i in range(len(data[data.files[0]]))]\n"
        )
        step["data_config"] = {
            "name": "images", "type": "DataContainer", "user_script": str(script),
            "load_dataset_config": {"type": "images", "data_dir": str(tmp_path / "calib.npz")},
            "pre_process_data_config": {"type": "skip_pre_process"},
            "post_process_data_config": {"type": "skip_post_process"},
            "dataloader_config": {"batch_size": 1},
        }  # fmt: skip
    run = {
        "input_model": {"type": "OnnxModel", "model_path": str(MODEL)},
        "passes": {"compress": step},
        "output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "no_artifacts": False,
    }  # fmt: skip
    workflows.run(run, package_config=package_config())
    found = sorted((tmp_path / "out").rglob("*.onnx"))
    assert len(found) == 1 and (tmp_path / "report.html").is_file()
    np.testing.assert_allclose(outputs(found[0], data), outputs(expected, data), atol=1e-5)


def test_the_sample_configuration_of_olive_is_valid(tmp_path: Path) -> None:
    pytest.importorskip("olive.workflows")
    from olive.workflows.run.config import RunConfig

    from lindep_onnx.integrations.olive import package_config

    sample = json.loads((ROOT / "docs" / "recipes" / "olive.json").read_text(encoding="utf-8"))
    assert RunConfig.model_validate(sample).passes
    command = [sys.executable, "-m", "lindep_onnx.integrations.olive", str(tmp_path / "package.json")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert json.loads((tmp_path / "package.json").read_text()) == package_config()


def test_onnxsim_before_makes_a_model_that_compresses_alike(
    data: dict[str, np.ndarray], expected: onnx.ModelProto
) -> None:
    onnxsim = pytest.importorskip("onnxsim")
    simple, ok = onnxsim.simplify(onnx.load(MODEL))
    assert ok
    result = lindep_onnx.compress(simple, data, **OPTIONS)
    assert result.report.after.parameters <= 0.5 * result.report.before.parameters
    np.testing.assert_allclose(outputs(result.model, data), outputs(expected, data), atol=0.3)


@pytest.mark.slow
def test_a_transformer_that_optimum_exported_loses_hidden_neurons(tmp_path: Path) -> None:
    exporter = pytest.importorskip("optimum.exporters.onnx")
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **shape)).eval()
    with torch.no_grad():  # twins: every second hidden neuron of the first block is the one before it
        layer = model.encoder.layer[0].intermediate.dense
        layer.weight[1::2], layer.bias[1::2] = layer.weight[::2], layer.bias[::2]
    exporter.onnx_export_from_model(model, tmp_path, task="feature-extraction", do_validation=False, opset=17)
    tokens = np.random.default_rng(0).integers(0, 50, (40, 12), dtype=np.int64)
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "token_type_ids": np.zeros_like(tokens)}
    report = lindep_onnx.compress(tmp_path / "model.onnx", feeds).report
    assert report.verification is not None and report.verification.passed
    assert sum(group.removed for group in report.groups) == 32
