"""Run in a fresh process with HF_ENDPOINT set: the ways of a saved model to the hub. Prints one JSON object."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import bs_exp
from bs_exp.cli.commands import run_command
from bs_exp.errors import UploadError
from bs_exp.models.upload import upload

folder, other = Path(sys.argv[1]), Path(sys.argv[2])
run_command(["push", str(folder), "org/command", "--private"])
model = bs_exp.load(folder).model
model.save_pretrained(other, push_to_hub=True, repo_id="org/native", max_shard_size="40KB")
model.push_to_hub("org/mixin")
try:
    upload(folder, "closed/model")
    refused = ""
except UploadError as error:
    refused = str(error)
print(json.dumps({"refused": refused}))
