#!/bin/bash
set -e
cd /app
patch -p1 < /solution/gold.patch
