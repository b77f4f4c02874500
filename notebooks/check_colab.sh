#!/usr/bin/env bash
# The notebooks, and the tests of what we touch in other libraries, with the versions of Colab's image of 2026-08-19.
#
#    notebooks/check_colab.sh [FOLDER]    a new virtual environment is made there; default: .venv-colab
#
# Installing this package must change none of them: a changed version asks for a restart, which loses users.
# (torch is the tested one: Colab's own, 2.11.0+cu128, wants a GPU driver.)
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv-colab}
colab=(torch==2.13.0 transformers==5.15.0 huggingface-hub==1.27.0 ipywidgets==7.7.1 'numpy==2.1.*' 'matplotlib==3.10.*'
       'ipykernel<7' nbclient nbformat pytest pytest-xdist hypothesis psutil tqdm)

python3 -m venv --clear "$folder"
. "$folder/bin/activate"
pip install -q "${colab[@]}"
pip freeze --exclude-editable | sort > "$folder/before.txt"
pip install -q -e .
pip freeze --exclude-editable | sort > "$folder/after.txt"
changed=$(comm -23 "$folder/before.txt" "$folder/after.txt")
if [ -n "$changed" ]; then
    echo "installing the package changed what was there: $changed"
    exit 1
fi
echo "installing the package added: $(comm -13 "$folder/before.txt" "$folder/after.txt" | tr '\n' ' ')"
python notebooks/run.py --check
python -m pytest -q tests/runtime/test_drift.py tests/apps/test_widget.py tests/generation/test_chat.py tests/models/test_published_format.py \
    tests/runtime/test_prefetch.py tests/models/test_families.py tests/weights/test_hub*.py tests/weights/test_source.py tests/models/test_checkpoint.py tests/analysis/test_replay.py tests/apps/test_notebooks.py

# the widget in a browser, in a JupyterLab of ipywidgets 7's time
pip install -q 'jupyterlab<4' 'jupyterlab-widgets<2' playwright
REQUIRE_BROWSER=1 python -m pytest -q -m browser -n 0
