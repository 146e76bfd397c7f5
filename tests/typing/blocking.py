# SPDX-License-Identifier: MIT
"""For the type checker alone; nobody runs this: what the blocking face looks like to it."""

from __future__ import annotations

from typing_extensions import assert_type

from qmpmirror import Disk, Finding, JobInfo, MigrationResult, Progress, Result, sync


def use() -> None:
    with sync.connect("/vm/qmp.sock", timeout=3.0) as vm:
        assert_type(vm, sync.Machine)
        assert_type(vm.disks(), list[Disk])
        assert_type(vm.disk("vda"), Disk)
        assert_type(vm.jobs(), list[JobInfo])
        assert_type(vm.recover(dry_run=True), list[Finding])
        copy = vm.blockcopy("vda", "/export/copy.qcow2", shallow=True)
        assert_type(copy, sync.Copy)
        for progress in copy.progress(0.1):
            assert_type(progress, Progress)
        assert_type(copy.ready(seconds=1), bool)
        assert_type(copy.pivot(), Result)
        assert_type(vm.blockpull("vda", base="/vm/base.qcow2"), sync.Pull)
        commit = vm.blockcommit("vda", active=True)
        assert_type(commit, sync.ActiveCommit | sync.InnerCommit)
        assert_type(vm.blockjob("vda"), sync.BlockJob | None)
        assert_type(vm.migrate(vm, incremental=True), MigrationResult)


def misuse(vm: sync.Machine) -> None:
    vm.blockcopy("vda")  # type: ignore[call-arg]
    vm.blockcopy("vda", "copy", shalow=True)  # type: ignore[call-arg]
    vm.blockcopy("vda", "copy", shallow="yes")  # type: ignore[arg-type]
    sync.connect(7)  # type: ignore[arg-type]
