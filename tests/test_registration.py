"""`DiffusionPipeline.from_pretrained` on pipelines of this package, whichever package is imported first."""

import subprocess
import sys

import pytest
from local_hub import serve
from scripts import ROOT, run, run_script
from small_cascade import small_cascade


OURS_FIRST = "import cdm_diffusers\nfrom diffusers import DiffusionPipeline"
DIFFUSERS_FIRST = "from diffusers import DiffusionPipeline\nimport cdm_diffusers"
REGISTERED_ONLY = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("cdm_diffusers.registration", "{ROOT}/cdm_diffusers/registration.py")
registration = importlib.util.module_from_spec(spec)
spec.loader.exec_module(registration)
registration.register()
assert not sys.modules.keys() & {{"diffusers", "torch", "numpy", "cdm_diffusers"}}
assert importlib.util.find_spec("diffusers")  # as others do who ask whether it is there
import diffusers
assert "diffusers.pipelines.pipeline_loading_utils" not in sys.modules
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
assert list(LOADABLE_CLASSES["cdm_diffusers"]) == ["ModelMixin", "SchedulerMixin"]
assert "cdm_diffusers" not in sys.modules
"""
LOAD = """
import diffusers
for name in sys.argv[1:]:
    print(type(DiffusionPipeline.from_pretrained(name)).__name__)
assert diffusers.SuperResolutionPipeline is cdm_diffusers.SuperResolutionPipeline
assert diffusers.DDIMScheduler.__name__ == "DDIMScheduler"
try:
    diffusers.NoPipeline
except AttributeError as error:
    assert "has no attribute NoPipeline" in str(error)
else:
    raise AssertionError
"""
CLASSES = ["CascadedDiffusionPipeline", "SuperResolutionPipeline"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A cascade and one of its stages, where a Hub has them."""
    root = tmp_path_factory.mktemp("hub")
    cascade = small_cascade(num_stages=2)
    cascade.save_pretrained(root / "models" / "shop" / "clothes")
    cascade.stage_pipeline("super_res_1").save_pretrained(root / "models" / "shop" / "upsampler")
    return root


@pytest.mark.parametrize("imports", [OURS_FIRST, DIFFUSERS_FIRST, REGISTERED_ONLY])
def test_local_folders(models, imports):
    folders = [models / "models" / "shop" / name for name in ("clothes", "upsampler")]
    assert run("-c", f"import sys\n{imports}\nimport cdm_diffusers\n{LOAD}", *folders).split() == CLASSES


@pytest.mark.parametrize("imports", [DIFFUSERS_FIRST, REGISTERED_ONLY])
def test_hub_ids(models, imports):
    with serve(models) as hub:
        printed = run(
            "-c", f"import sys\n{imports}\nimport cdm_diffusers\n{LOAD}", "shop/clothes", "shop/upsampler", **hub
        )
    assert printed.split() == CLASSES


def test_without_the_import_diffusers_does_not_know_them(models):
    program = "import sys\nfrom diffusers import DiffusionPipeline\nDiffusionPipeline.from_pretrained(sys.argv[1])"
    result = run_script("-c", program, models / "models" / "shop" / "clothes")
    assert result.returncode == 1 and "has no attribute CascadedDiffusionPipeline" in result.stderr


def test_registering_twice_is_registering_once():
    again = "finders = len(sys.meta_path)\nregistration.register()\nassert len(sys.meta_path) == finders"
    subprocess.run([sys.executable, "-c", f"{REGISTERED_ONLY}\n{again}"], check=True)
