<#
.SYNOPSIS
Stage 1 on one workstation: trains the nnU-Net encoder and the Vision-Mamba bridge (train.py).

.DESCRIPTION
Uses the active conda environment (mamba5090), else .venv. Flags of train.py that are not named here may follow
and are passed on as they are. The exit code is train.py's.

.EXAMPLE
.\run_train_5090.ps1 -Epochs 5 -BatchSize 2 -Lr 1e-4

.EXAMPLE
.\run_train_5090.ps1 -Epochs 5 --objective align --resume never
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [ValidateRange(1, 100000)]
    [int] $Epochs = 5,

    [ValidateRange(1, 4096)]
    [int] $BatchSize = 2,

    # Text and not a number: a German or French Windows must not turn 1e-4 into 0,0001.
    [ValidatePattern('^([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$')]
    [string] $Lr = '1e-4',

    [Parameter(ValueFromRemainingArguments = $true)]
    [string[]] $TrainArguments = @()
)

$ErrorActionPreference = 'Stop'
$arguments = @('--epochs', $Epochs, '--batch_size', $BatchSize, '--lr', $Lr) + $TrainArguments
& (Join-Path $PSScriptRoot 'scripts/invoke_python.ps1') -Script 'train.py' -Arguments $arguments
exit $LASTEXITCODE
