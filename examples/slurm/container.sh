# shellcheck shell=bash
# The interpreter, and srun's options for a pyxis/enroot container where IMAGE names one; sourced by the batch
# scripts. The checkout has the same path inside, since the job runs from it.
# shellcheck disable=SC2034 # the batch scripts read it
CONTAINER=()
if [[ -n "${IMAGE:-}" ]]; then
    # shellcheck disable=SC2034
    CONTAINER=(--container-image "$IMAGE" --container-workdir "$PWD" --container-mounts "${MOUNTS:-$PWD:$PWD}")
    export PYTHON="${PYTHON:-python}"
fi
export PYTHON="${PYTHON:-.venv/bin/python}"
if [[ -z "${IMAGE:-}" ]] && ! command -v "$PYTHON" >/dev/null; then
    echo "PYTHON is $PYTHON, which is not there on $(hostname): run make setup in the checkout, or set PYTHON to the" \
        "interpreter of the environment, as it is named on every node" >&2
    exit 1
fi
