"""Ways to run it: a Helm chart, plain manifests, an image. `build.py` writes what is made from something else."""
