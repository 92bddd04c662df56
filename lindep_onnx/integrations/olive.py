"""A pass for Olive (olive-ai), `LindepCompression`, and the package configuration that tells Olive of it.

Olive finds passes by a package configuration. `python -m lindep_onnx.integrations.olive PACKAGE.json` writes one that
has this pass beside Olive's own, for `olive run --config RUN.json --package-config PACKAGE.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from olive.data.config import DataConfig
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.package_config import OlivePackageConfig
from olive.passes import Pass
from olive.passes.onnx.common import get_external_data_config, model_proto_to_olive_model
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from lindep_onnx.api import compress
from lindep_onnx.errors import UsageError
from lindep_onnx.report.writing import check_path, write_report


class LindepCompression(Pass):  # type: ignore[misc, unused-ignore]
    """Remove channels of an ONNX model that are linear combinations of others."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "calib": PassConfigParam(
                type_=str, description="Calibration data as the command line takes it: a path, or FILE.py:FUNC."
            ),
            "data_config": PassConfigParam(
                type_=DataConfig | dict, description="Calibration data as Olive takes it, instead of `calib`."
            ),
            "options": PassConfigParam(
                type_=dict, default_value={}, description="Fields of lindep_onnx.Config, such as {'params': 0.5}."
            ),
            "report": PassConfigParam(type_=str, description="Where to write the report, as .json or .html."),
            **get_external_data_config(),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        if not isinstance(model, ONNXModelHandler):
            raise UsageError("LindepCompression takes one ONNX model; run it behind OnnxConversion.")
        if config.report is not None:
            check_path(Path(config.report))
        result = compress(model.model_path, _calibration(model, config), **config.options)
        if config.report is not None:
            write_report(result.report, config.report)
        path = Path(output_model_path)
        if path.suffix != ".onnx":
            path = path / Path(model.model_path).name
        return model_proto_to_olive_model(result.model, path, config)


def _calibration(model: ONNXModelHandler, config: Any) -> Any:
    if config.data_config is None:
        return config.calib
    given = config.data_config
    data = given if isinstance(given, DataConfig) else DataConfig(**given)
    container = data.to_data_container()
    return container.create_calibration_dataloader(model_path=model.model_path, io_config=model.io_config)


def package_config() -> dict[str, Any]:
    """Olive's own passes and this one, for `olive.workflows.run(..., package_config=...)`."""
    found: dict[str, Any] = json.loads(Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8"))
    found["passes"]["LindepCompression"] = {
        "module_path": f"{LindepCompression.__module__}.{LindepCompression.__name__}",
        "supported_providers": ["*"],
        "supported_accelerators": ["*"],
        "supported_precisions": ["*"],
    }
    return found


if __name__ == "__main__":
    # Under its own name: Olive imports the pass from there.
    from lindep_onnx.integrations import olive

    Path(sys.argv[1]).write_text(json.dumps(olive.package_config(), indent=2) + "\n", encoding="utf-8")
