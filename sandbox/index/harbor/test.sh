#!/bin/bash
# The verdict on /app: 1 or 0 in /logs/verifier/reward.txt.
mkdir -p /logs/verifier
python3 -I /tests/judge.py /app /tests > /logs/verifier/judge.txt 2>&1
if [ "$?" = 0 ]; then echo 1; else echo 0; fi > /logs/verifier/reward.txt
