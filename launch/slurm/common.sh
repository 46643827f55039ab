# Sourced by the batch scripts beside it and by node.sh: how SLURM's signals reach the processes that they are for.
#
# SIGUSR1 (the time is nearly up) comes to the batch script; SIGTERM (scancel, preemption) comes to the tasks, and on
# some clusters to every process below them. The batch script passes what it gets to srun, srun to the task of each
# node, and the task, node.sh, to the training processes. Nobody in between may die of a signal, or lose one that comes
# while the next one in the chain is still starting: so each notes it, and repeats it until the next one has ended.

STOPPED=85 # exit code: stopped by a signal, and goes on when started again
stopped=
trap 'stopped=1' USR1 TERM

# deaf SIGNALS COMMAND: start it in the background; it and its children ignore these signals until they catch them.
deaf() {
    trap '' $1
    "${@:2}" &
    trap 'stopped=1' USR1 TERM
}

# relay PID COMMAND: wait for the child PID and return its exit code; once there was a signal, run COMMAND every second.
relay() {
    while kill -0 "$1" 2>/dev/null; do
        [ -z "$stopped" ] || $2
        (trap '' USR1 TERM && exec sleep 1)
    done
    wait "$1"
}

# run_on_nodes SIGNAL SCRIPT ARGUMENTS: the whole of a batch script after its block. SIGNAL is how SCRIPT is stopped.
run_on_nodes() {
    local stop_signal=$1 code=$STOPPED first
    shift
    cd "$REPOSITORY" || exit 2
    setup || { echo "setup() failed: see the block at the top of the batch script" && exit 2; }

    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    export MAIN_ADDRESS MAIN_PORT ACCELERATE_CONFIG PROCESSES_PER_NODE
    MAIN_ADDRESS=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    MAIN_ADDRESS=${MAIN_ADDRESS:-$first}
    MAIN_PORT=$((10000 + SLURM_JOB_ID % 20000)) # below the ports that systems give to outgoing connections
    echo "$(date '+%F %T') job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}:" \
        "$SLURM_JOB_NODELIST x $PROCESSES_PER_NODE processes, $MAIN_ADDRESS:$MAIN_PORT"

    if [ -z "$stopped" ]; then
        # When one node's task has ended, the others have a minute to end too: a peer is lost, or all are done.
        deaf "USR1 TERM" srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
            ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --wait=60 --kill-on-bad-exit=0 \
            bash launch/slurm/node.sh "$stop_signal" "$@"
        relay $! "kill -USR1 $!"
        code=$?
    fi
    [ "$code" -eq "$STOPPED" ] || exit "$code" # done or failed
    requeue
}

# Queue this job again; not if SLURM itself is ending it (scancel), or ends it to queue it again (preemption).
requeue() {
    local state= again="the same sbatch command goes on from here"
    for _ in 1 2 3 4 5 6; do # a busy controller may not answer at once
        state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID") && break
        sleep 5
    done
    if [ "$state" != RUNNING ]; then
        echo "stopped by a signal, job ${state:-not to be found}; $again"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "stopped by a signal, not queued again: it has been MAX_RESTARTS=$MAX_RESTARTS times; $again"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        echo "stopped by a signal, queued again"
        exit 0
    else
        echo "stopped by a signal, SLURM refuses to queue it again (see above); $again"
    fi
    exit "$STOPPED"
}
