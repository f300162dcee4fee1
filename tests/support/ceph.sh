#!/usr/bin/env bash
# An S3 server that is no mock: Ceph's object gateway over one small cluster, all of it in FOLDER.
# Says "ready" once it answers; ends, and everything with it, when its standard input does.
#
#   ceph.sh FOLDER PORT MONITOR_PORT ACCESS_KEY SECRET_KEY
#
# Needs Debian's radosgw, ceph-mon, ceph-osd and ceph-mgr, and a process group of its own.
set -euo pipefail
folder=$1 port=$2 monitor=$3 access=$4 secret=$5
export CEPH_CONF=$folder/ceph.conf

mkdir -p "$folder"/{mon,mgr,osd,rgw,run}
fsid=$(cat /proc/sys/kernel/random/uuid)
# One copy of everything, no authentication among the daemons, little memory.
cat >"$CEPH_CONF" <<CONF
[global]
fsid = $fsid
mon host = [v1:127.0.0.1:$monitor]
ms bind msgr2 = false
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = none
auth service required = none
auth client required = none
auth allow insecure global id reclaim = true
mon allow pool size one = true
mon max pg per osd = 2000
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd objectstore = bluestore
osd memory target = 939524096
bluestore block size = 10737418240
bluestore cache autotune = false
bluestore cache size = 67108864
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 32
mon data = $folder/mon
mgr data = $folder/mgr
osd data = $folder/osd
rgw data = $folder/rgw
run dir = $folder/run
admin socket = $folder/run/\$name.asok
log file = $folder/\$name.log
mon cluster log file = $folder/cluster.log
CONF

answers() { # PORT
  for _ in $(seq 240); do
    if (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; then return; fi
    sleep 0.25
  done
  echo "nobody answers on port $1; see $folder/daemons.log" >&2
  return 1
}
# An OSD that comes a moment too early gives up ("wrong fsid"): then once more.
daemon() {
  until "$@" -f; do sleep 0.5; done </dev/null >>"$folder/daemons.log" 2>&1 &
}
# The whole process group, and at once: nothing here is kept.
trap 'kill -KILL 0' EXIT INT TERM

monmaptool --create --clobber --fsid "$fsid" --addv a "[v1:127.0.0.1:$monitor]" "$folder/monmap" >/dev/null
ceph-mon --mkfs -i a --monmap "$folder/monmap"
daemon ceph-mon -i a
answers "$monitor"
osd=$(cat /proc/sys/kernel/random/uuid)
# A client that comes before the monitor has elected itself may wait for ever.
for _ in $(seq 12); do
  if timeout --foreground 10 ceph osd new "$osd" 0 >/dev/null 2>&1; then break; fi
done
ceph-osd -i 0 --mkfs --osd-uuid "$osd" >>"$folder/daemons.log" 2>&1
daemon ceph-mgr -i x
daemon ceph-osd -i 0
daemon radosgw -n client.rgw
timeout --foreground 90 radosgw-admin user create --uid=test --display-name=test \
  --access-key="$access" --secret-key="$secret" >/dev/null 2>>"$folder/daemons.log"
answers "$port"
echo ready
cat >/dev/null # until whoever started us closes it, or is gone
