#!/usr/bin/env bash
# The task of one node: node.sh SIGNAL SCRIPT ARGUMENTS starts this node's processes with accelerate launch.
#
# A signal to the launcher would kill it, and leave its processes alone or with half a minute. So it ignores what SLURM
# sends, and its processes, its children, get SIGNAL from here. USR1 is for those that catch it (until they do, they
# ignore it) and end well; then TERM is ignored too. TERM is for those that may end at any time.
stop_signal=$1
shift
. launch/slurm/common.sh

ignored=USR1
if [ "$stop_signal" = USR1 ]; then
    ignored="USR1 TERM"
    export PET_SIGNALS_TO_HANDLE=SIGINT,SIGHUP,SIGQUIT # torch's launcher would catch TERM and end its processes
fi
deaf "$ignored" accelerate launch --config_file "$ACCELERATE_CONFIG" \
    --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" \
    --num_processes $((SLURM_NNODES * PROCESSES_PER_NODE)) \
    --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT" "$@"
launcher=$!

relay "$launcher" "pkill -$stop_signal -P $launcher"
code=$?
if [ -n "$stopped" ] && { [ "$code" -eq 0 ] || [ "$stop_signal" = TERM ]; }; then
    exit "$STOPPED"
fi
exit "$code"
