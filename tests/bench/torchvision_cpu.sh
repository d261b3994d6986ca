#!/usr/bin/env bash
# torchvision_cpu.sh FOLDER: torchvision's compiled operators beside a CPU build of torch 2.13 or newer, from PyPI alone;
# its last line is the environment to run with. PyPI's torchvision is built for CUDA builds of torch. Its CPU operators
# only need the names of those libraries to exist, so stubs stand in for them.
# Where download.pytorch.org can be reached: pip install torchvision --index-url https://download.pytorch.org/whl/cpu
set -euo pipefail
folder=$(realpath -m "${1:?usage: torchvision_cpu.sh FOLDER}")
python3 -m pip install -q --no-deps --upgrade --target "$folder" torchvision==0.29.2
mkdir -p "$folder/stubs"
stub() { # stub LIBRARY FUNCTION...: the functions do nothing and return null; their version is the library's name
    printf 'void *%s(void) { return 0; }\n' "${@:2}" |
        cc -shared -fPIC -w -o "$folder/stubs/$1" -Wl,-soname,"$1" -Wl,--version-script=<(echo "$1 { *; };") -x c -
}
stub libc10_cuda.so torch_c10_cuda_check_msg torch_c10_cuda_free_error_msg
stub libtorch_cuda.so aoti_torch_get_current_cuda_stream
stub libcudart.so.13 __cuda{GetKernel,LaunchKernel,{Pop,Push}CallConfiguration,Register{FatBinary,FatBinaryEnd,Function,Var}} \
    __cudaUnregisterFatBinary cuda{DeviceGetAttribute,DeviceSynchronize,GetDevice,GetLastError}
echo "PYTHONPATH=$folder LD_LIBRARY_PATH=$folder/stubs"
