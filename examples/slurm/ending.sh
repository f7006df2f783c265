# shellcheck shell=bash
# What became of a start of the job, and what comes next; sourced by train.sbatch. The table of docs/cluster.md
# says it in words.
#
# Files, all under RUN_DIR/logs, where N counts the starts of a job from 0:
#   JOB-N/rank-*.log       output of each rank
#   JOB-N/stop             made when the job is asked to stop
#   JOB-N/ending           from rank 0 where no rank failed: finished, stopped or paused, and the iteration
#   JOB-N/last_line        the last line of this script, for megatron-exact status
#   JOB-N/node-*.ending    from each node: exit code, kind of the failure, node, message
#   requeues-JOB.tsv       a line for each time this script asked for another start: N, seconds since 1970,
#                          kind (asked or fault), node or -, iteration saved before and at the end, why

TRACKER="$RUN_DIR/latest_checkpointed_iteration.txt"
START="${SLURM_RESTART_COUNT:-0}"
LOG_DIR="$RUN_DIR/logs/$SLURM_JOB_ID-$START"
REQUEUES="$RUN_DIR/logs/requeues-$SLURM_JOB_ID.tsv"
MAX_RESTARTS="${MAX_RESTARTS:-2}"
export LOG_DIR MEGATRON_EXACT_ENDING="$LOG_DIR/ending"

# Print a line that may be the last one, and keep it.
say() {
    echo "$*"
    echo "$*" 2>/dev/null >"$LOG_DIR/last_line" || true # the disk may be full
}

# The iteration that was saved last.
saved() { cat "$TRACKER" 2>/dev/null || echo none; }

# One entry of `scontrol show job`.
field() { scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | sed -n "s/.* $1=\([^ ]*\).*/\1/p"; }

# What Slurm does with the job: running, or why it ends. A job that ends is COMPLETING whatever the reason;
# one that Slurm starts again counts that start already. A preempted job with a grace time still runs.
fate() {
    local state restarts
    state="$(field JobState)" restarts="$(field Restarts)"
    if [[ "$state" == RUNNING || -z "$state" ]]; then # nothing: the controller does not answer
        echo running
    elif ((${restarts:-0} > START)); then
        echo requeued
    elif (($(date +%s) >= LIMIT)); then
        echo timeout
    elif [[ "$(field PreemptTime)" == [0-9]* ]]; then
        echo preempted
    else
        echo cancelled
    fi
}

declare -A FATES=(
    [running]="preempted, with a grace time"
    [requeued]="preempted, or a node was lost: Slurm starts the job again"
    [timeout]="the time limit is over: submit the job again to resume"
    [preempted]="preempted in a partition that does not requeue: submit the job again to resume"
    [cancelled]="cancelled: the job does not come back; submit it again to resume"
)

begin_start() {
    mkdir -p "$LOG_DIR"
    LIMIT="$(date --date="$(field EndTime)" +%s 2>/dev/null || echo 99999999999)"
    [[ -z "$asked" ]] || touch "$LOG_DIR/stop"
    saved_before="$(saved)"
    ((START > 0)) || return 0
    local row last
    row="$(awk -F '\t' -v start="$((START - 1))" '$1 == start' "$REQUEUES" 2>/dev/null | tail -n 1 || true)"
    if [[ -z "$row" ]]; then # not by this script, which was ended as well
        last="$(find "$RUN_DIR/logs/$SLURM_JOB_ID-$((START - 1))" "$RUN_DIR/losses.jsonl" -type f \
            -printf '%T@\n' 2>/dev/null | sort -n | tail -n 1 || true)"
        [[ -n "$last" ]] || last="$(date +%s)"
        row="$((START - 1))"$'\t'"${last%%.*}"$'\tslurm\t-\t-\t-\trequeued by Slurm (preempted, or a node was lost)'
    fi
    # for run.json: when it ended, the node, why
    MEGATRON_EXACT_RESTART="$(cut -f 2,4,7 <<<"$row")"
    export MEGATRON_EXACT_RESTART
}

# The failure that explains the others: numbers that are not finite, a refusal, then a rank that was killed
# or failed; ranks that lost another one come last.
first_failure() {
    local kind
    for kind in nan user signal fault lost; do
        awk -F '\t' -v kind="$kind" '$2 == kind' "$LOG_DIR"/node-*.ending 2>/dev/null | head -n 1 | grep . && return
    done
    return 1
}

# How often, in a row and until now, a start ended by a fault with nothing saved since it began.
fruitless_starts() {
    [[ -r "$REQUEUES" ]] || { echo 0 && return; }
    awk -F '\t' -v now="$1" '$3 == "fault" { count = ($5 == now) ? count + 1 : 0 } END { print count + 0 }' \
        "$REQUEUES"
}

# Ask Slurm for another start; the last line says so, or why it does not come.
requeue() { # kind node why
    local now before="$saved_before" node="$2" failures excluded
    now="$(saved)"
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\n' "$START" "$(date +%s)" "$1" "$node" "$before" "$now" "$3" >>"$REQUEUES"
    trap '' TERM USR1 # Slurm ends this script now
    if ! scontrol requeue "$SLURM_JOB_ID" 2>"$LOG_DIR/requeue"; then
        say "$3; iteration $now is saved, but Slurm does not requeue the job ($(tail -n 1 "$LOG_DIR/requeue"))." \
            "Submit it again: it resumes from there"
        exit 1
    fi
    failures="$(awk -F '\t' -v node="$node" '$3 == "fault" && $4 == node' "$REQUEUES" | wc -l)"
    if [[ "$node" != - ]] && ((failures >= 2)); then
        excluded="$(field ExcNodeList)"
        [[ "$excluded" == "(null)" ]] && excluded=""
        if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${excluded:+$excluded,}$node"; then
            echo "node $node is excluded: $failures starts failed on it"
        fi
    fi
    sleep 1 # what Slurm itself says of it comes first
    say "$3; requeued: the job resumes from $([[ "$now" == none ]] && echo "its beginning" || echo "iteration $now")"
    exit 0
}

# What comes next, after srun has ended; the last line of the output.
end_start() { # exit code of srun
    local code="$1" how="" iteration="" now failure="" kind="" node=- why="" count state where="see above"
    now="$(saved)"
    [[ -r "$LOG_DIR/ending" ]] && read -r how iteration <"$LOG_DIR/ending"
    failure="$(first_failure || true)"
    if [[ -n "$failure" ]]; then
        IFS=$'\t' read -r code kind node why <<<"$failure"
        [[ "$kind" == lost && "$why" =~ rank\ [0-9]+\ \(([A-Za-z0-9._-]+)\) ]] && node="${BASH_REMATCH[1]}"
        [[ "$kind" == lost ]] || why="$why on $node"
    fi

    [[ "$how" == finished ]] && say "finished at iteration $iteration" && exit 0
    state="$(fate)"
    if [[ "$state" != running ]]; then
        say "${FATES[$state]} (saved: $([[ "$now" == none ]] && echo nothing || echo "iteration $now"))"
        exit "$code"
    fi
    case "$how" in
        paused) say "ended at iteration $iteration, as its arguments ask; submit the job again to resume" && exit 0 ;;
        stopped) requeue asked - "asked to stop by ${asked:-TERM}: saved iteration $iteration" ;;
    esac
    case "$kind" in
        nan) say "not restarted: $why" && exit "$code" ;;
        user) say "not restarted, it would end the same way: $why" && exit "$code" ;;
    esac
    if [[ -z "$kind" ]]; then
        why="srun ended with exit code $code before any rank told why"
        [[ -n "$asked" ]] && why="asked to stop by $asked while the ranks started"
        [[ -z "$asked" ]] && ((code < 128)) && kind=fault
    fi
    if [[ "$kind" == fault && "$now" == "$saved_before" ]]; then
        compgen -G "$LOG_DIR/rank-*.log" >/dev/null && where="logs of the ranks: $LOG_DIR"
        say "not restarted, since nothing was saved since the start: $why ($where)"
        exit "$((code ? code : 1))"
    fi
    count="$(fruitless_starts "$now")"
    [[ "$now" == "$saved_before" ]] && count=$((count + 1)) || count=0
    if ((count >= MAX_RESTARTS)); then
        say "not restarted: $count starts in a row ended before a save (MAX_RESTARTS): $why"
        exit "$((code ? code : 1))"
    fi
    requeue fault "$node" "$why"
}
