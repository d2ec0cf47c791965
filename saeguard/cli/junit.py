"""Write test results as JUnit XML, which CI systems read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from xml.etree import ElementTree as ET

from saeguard.policy_tools.test_cases import cases_path
from saeguard.policy_tools.test_results import Result


def junit_xml(results: Sequence[Result]) -> bytes:
    """Return one test suite per policy and one test case per case; to-do cases count as skipped.

    The format is that of the Jenkins xUnit plugin's `junit-10.xsd`, which GitLab's and GitHub's
    reporters read as well.
    """
    root = ET.Element("testsuites", name="saeguard")
    for policy, group in groupby(results, key=lambda result: result.policy):
        cases = list(group)
        file = os.fspath(cases_path(policy.path)).encode(errors="replace").decode()
        suite = ET.SubElement(root, "testsuite", name=f"{policy.id} {policy.mode}", file=file)
        suite.set("tests", str(len(cases)))
        suite.set("failures", str(sum(r.status == "failed" for r in cases)))
        suite.set("errors", "0")
        suite.set("skipped", str(sum(r.status in {"skipped", "todo"} for r in cases)))
        for result in cases:
            case = ET.SubElement(suite, "testcase", name=result.case.name, classname=policy.id)
            case.set("file", file)
            case.set("line", str(result.case.line))
            if result.status == "failed":
                ET.SubElement(case, "failure", message=result.complaint, type="verdict")
            elif result.status in {"skipped", "todo"}:
                ET.SubElement(case, "skipped", message=f"{result.status}: {result.complaint}")
    ET.indent(root)
    written: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return written
