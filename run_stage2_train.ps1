<#
.SYNOPSIS
Stage 2 on one workstation: trains vision and bridge through the frozen language model (train_vlm.py), with 96
visual tokens unless told otherwise.

.DESCRIPTION
Continues from outputs\vision_bridge_vlm_final.pt where there is one; --vision_checkpoint FILE starts from another,
--from_scratch from none. Uses the active conda environment (mamba5090), else .venv. Flags of train_vlm.py that are
not named here may follow and are passed on as they are. The exit code is train_vlm.py's.

.EXAMPLE
.\run_stage2_train.ps1

.EXAMPLE
.\run_stage2_train.ps1 -Epochs 2 -Lr 1e-5 --vision_checkpoint outputs/vision_bridge_best_val.pt
#>
[CmdletBinding(PositionalBinding = $false)]
param(
    [ValidateRange(1, 100000)]
    [int] $Epochs = 20,

    [ValidateRange(1, 4096)]
    [int] $BatchSize = 1,

    # Text and not a number: a German or French Windows must not turn 2e-5 into 0,00002.
    [ValidatePattern('^([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?$')]
    [string] $Lr = '2e-5',

    [ValidateRange(1, 100000)]
    [int] $MaxVisualTokens = 96,

    [Parameter(ValueFromRemainingArguments = $true)]
    [string[]] $TrainArguments = @()
)

$ErrorActionPreference = 'Stop'
$arguments = @('--epochs', $Epochs, '--batch_size', $BatchSize, '--lr', $Lr,
    '--max_visual_tokens', $MaxVisualTokens) + $TrainArguments
& (Join-Path $PSScriptRoot 'scripts/invoke_python.ps1') -Script 'train_vlm.py' -Arguments $arguments
exit $LASTEXITCODE
