#!/usr/bin/env bash
# Runs train, sample or score on all hosts of a Cloud TPU slice together.
#
#   tpu_scripts/run_on_slice.sh TPU ZONE train \
#     --model=hf:ORG/NAME --data=/mnt/shared/pairs.jsonl --out=/mnt/shared/tuned
#
# Run it on your own machine, where gcloud is logged in, in a clone. What the clone holds, but for
# what git ignores, is copied to ~/humpback_jax of every host and installed there; all paths are
# those of the hosts. What each of them needs:
#
#   --out      on a file system that all hosts share (NFS, such as Filestore), mounted at the same
#              path: weights, resume states and shards are written there by every host. humpback
#              writes to no bucket (gs://).
#   --data, --heldout, --prompts
#              readable on every host at the same path.
#   --tokens   may lie on a disk of each host, which then tokenises all rows.
#   --model    hf:ORG/NAME and gs://... are fetched by every host.
#
# The same command again continues; `train` does with --config.train.resume_every=N. A connection
# that breaks may end the run: start it where yours does not, e.g. in tmux.
set -euo pipefail

refuse() {
  echo "run_on_slice.sh: $1" >&2
  exit 2
}

if [ $# -lt 3 ]; then
  refuse "usage: tpu_scripts/run_on_slice.sh TPU ZONE train|sample|score --out=/SHARED/FOLDER ..."
fi
tpu=$1 zone=$2 verb=$3
shift 2

case $verb in
  train | sample | score) ;;
  *) refuse "several hosts share the work of train, sample and score; $verb takes one host." ;;
esac
out='' flag=''
for word in "$@"; do
  value=$word
  case $word in
    --*=*) flag=${word%%=*} value=${word#*=} ;;
    --*) flag=$word value='' ;;
  esac
  if [ "$flag" = --out ]; then out=$value; fi
  case $flag:$value in
    --model:*) ;;
    *gs://*) refuse "$flag: buckets hold models alone; take a file system that all hosts mount." ;;
  esac
done
case $out in
  '') refuse "$verb needs --out=/SHARED/FOLDER, on a file system that all hosts share." ;;
  /*) ;;
  *) refuse "--out=$out has to be an absolute path, on a file system that all hosts share." ;;
esac
shared=$out
if [ "$verb" != train ]; then shared=$(dirname "$out"); fi

on_hosts() {
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$zone" --worker="$1" --command="$2"
}

clone=$(cd "$(dirname "$0")/.." && pwd)
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git -C "$clone" ls-files -z --cached --others --exclude-standard |
  tar -C "$clone" --null --files-from=- -czf "$archive"
gcloud compute tpus tpu-vm scp "$archive" "$tpu:humpback_jax.tar.gz" --zone="$zone" --worker=all

# Weights written to folders that are not shared are found to be incomplete after hours of training.
printf -v folder %q "$shared"
mark=$folder/.seen_by_all_hosts
on_hosts 0 "mkdir -p $folder && touch $mark"
on_hosts all "test -e $mark || { \
  echo \"\$(hostname) does not see what the first host writes to $folder: it is not shared.\" >&2; \
  exit 1; }; \
mkdir -p humpback_jax && tar -xzf humpback_jax.tar.gz -C humpback_jax && \
humpback_jax/tpu_scripts/install.sh"

printf -v words ' %q' "$@"
on_hosts all "rm -f $mark; cd humpback_jax && \
HUMPBACK_DISTRIBUTED=1 .venv/bin/humpback$words"
