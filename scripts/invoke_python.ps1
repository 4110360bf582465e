# Runs one of the repository's Python scripts from the repository's folder, with the right interpreter and UTF-8
# text, and leaves with its exit code. Shared by run_train_5090.ps1 and run_stage2_train.ps1.
# Works in Windows PowerShell 5.1 and in PowerShell 7; ASCII only, because 5.1 reads this file as ANSI.
param(
    [Parameter(Mandatory = $true)]
    [string] $Script,

    [string[]] $Arguments = @()
)

$ErrorActionPreference = 'Stop'
# PowerShell 7.4 can turn a failed program into an exception; here its exit code is passed on instead.
$PSNativeCommandUseErrorActionPreference = $false

function Find-Python {
    param([string] $Repository)

    $active = $env:VIRTUAL_ENV -or ($env:CONDA_DEFAULT_ENV -and $env:CONDA_DEFAULT_ENV -ne 'base')
    $onPath = Get-Command python -CommandType Application -ErrorAction SilentlyContinue | Select-Object -First 1
    if ($active -and $onPath) {
        return $onPath.Source
    }
    foreach ($candidate in '.venv/Scripts/python.exe', '.venv/bin/python') {
        $python = Join-Path $Repository $candidate
        if (Test-Path -LiteralPath $python) {
            return $python
        }
    }
    # conda's base comes last: it is active in every new console, whether or not it holds the requirements.
    if ($env:CONDA_DEFAULT_ENV -and $onPath) {
        return $onPath.Source
    }
    return $null
}

$repository = Split-Path -Parent $PSScriptRoot
$python = Find-Python $repository
if (-not $python) {
    [Console]::Error.WriteLine('error: no Python environment found; run "conda activate mamba5090" first, or make ' +
        '.venv with "python scripts/run_tests.py"')
    exit 2
}

$previousEncoding = [Console]::OutputEncoding
$previousUtf8 = $env:PYTHONUTF8
$code = 1
Push-Location -LiteralPath $repository
try {
    try {
        [Console]::OutputEncoding = New-Object System.Text.UTF8Encoding $false
    }
    catch [System.IO.IOException] {
        Write-Verbose 'no console to set to UTF-8: the output is redirected'
    }
    $env:PYTHONUTF8 = '1'
    Write-Host "$python -u $Script $Arguments"
    # With 2>&1, *> or Tee-Object, 5.1 makes an error record of each line on stderr; 'Stop' would end the run at the first.
    $ErrorActionPreference = 'Continue'
    & $python -u $Script @Arguments
    $code = $LASTEXITCODE
}
finally {
    Pop-Location
    $env:PYTHONUTF8 = $previousUtf8
    try {
        [Console]::OutputEncoding = $previousEncoding
    }
    catch [System.IO.IOException] {
        Write-Verbose 'no console to set back'
    }
}
exit $code
