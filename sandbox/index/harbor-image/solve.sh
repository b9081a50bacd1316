#!/bin/bash
set -e
cd $folder
git apply /solution/gold.patch
