"""Record the digests that ``ktmoe verify --digest`` compares, after a change of bits.

Those of instruction sets that this machine lacks stay as they are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ktmoe_np import kt_kernel_ext as ext
from ktmoe_np.cli.digest import RECORDED


def main() -> None:
    """Write the file."""
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    for isa in ext.isa_info()["supported"]:
        command = [sys.executable, "-m", "ktmoe_np.cli", "verify", "--digest", "--json"]
        done = subprocess.run(
            command, env={**os.environ, "KTMOE_ISA": isa}, stdout=subprocess.PIPE, text=True, check=False
        )
        recorded[isa] = json.loads(done.stdout)["digests"]
        print(f"{isa}: recorded")
    recorded["avx_vnni"] = recorded["avx2"]  # changes sums of integers alone, which are exact
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n")


if __name__ == "__main__":
    main()
