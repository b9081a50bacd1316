#!/bin/bash
# The verdict on the repository in $folder: 1 or 0 in /logs/verifier/reward.txt.
mkdir -p /logs/verifier
cd $folder || exit 1
# where images of this kind keep the interpreter with the project's needs
if [ -f /opt/miniconda3/bin/activate ]; then . /opt/miniconda3/bin/activate testbed; fi
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi
# tests that lie in the image, as they were before the agent came
for path in $restored; do
    git checkout -q "$$(git rev-list --max-parents=0 HEAD | tail -n 1)" -- "$$path" 2>/dev/null
done
cp -a /tests/files/. . 2>/dev/null
if [ -s /tests/test.patch ]; then
    # tests that the agent wrote or changed do not count
    git apply --numstat /tests/test.patch | cut -f3 | while read -r path; do
        git checkout -q HEAD -- "$$path" 2>/dev/null || rm -f "$$path"
    done
    git apply /tests/test.patch || { echo 0 > /logs/verifier/reward.txt; exit 0; }
fi
$command > /logs/verifier/tests.txt 2>&1
python3 /tests/grade.py /logs/verifier/tests.txt /tests/tests.json > /logs/verifier/grade.txt
if [ "$$?" = 0 ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
