"""The web demo as a Space of the Hugging Face Hub; PIPELINE is a folder beside this file or a Hub id."""

import os

from cdm_diffusers.app.config import AppConfig
from cdm_diffusers.app.serve import serve


# A Space's proxy, which says who a visitor is, has a private address.
os.environ.setdefault("FORWARDED_ALLOW_IPS", "127.0.0.1,10.0.0.0/8,172.16.0.0/12,192.168.0.0/16")
serve(AppConfig(pipeline=os.environ.get("PIPELINE", "cascade"), host="0.0.0.0", max_images=8, max_steps=50))
