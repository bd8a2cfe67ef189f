"""The web demo as a Space of the Hugging Face Hub; PIPELINE is a folder beside this file or a Hub id."""

import os

from cdm_diffusers.app.config import AppConfig
from cdm_diffusers.app.serve import serve


serve(AppConfig(pipeline=os.environ.get("PIPELINE", "cascade"), host="0.0.0.0", max_images=8, max_steps=50))
