"""`bs-exp push`: a saved compressed model to the Hugging Face hub."""

from __future__ import annotations

import argparse

from bs_exp.printable import printable


def push(options: argparse.Namespace) -> None:
    """Uploads the model, or lists what would go up and what would stay; errors are those of `upload`."""
    from bs_exp.models.upload import check_repo_id, files_to_upload, upload
    from bs_exp.reporting.formats import size

    folder = options.folder.expanduser()
    check_repo_id(options.name)
    names, others = files_to_upload(folder)
    for name in names if options.dry_run else ():
        print(printable(f"{size((folder / name).stat().st_size):>12}  {name}"))
    for name in others:
        print(printable(f"{'stays':>12}  {name}"))
    if options.dry_run:
        print(printable(f"{len(names)} files would go to {options.name}"))
        return
    address = upload(
        folder, options.name, private=options.private, revision=options.revision, create_pr=options.create_pr
    )
    print(printable(address))
