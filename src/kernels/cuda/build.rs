//! The build script: with the feature `cuda`, nvcc compiles the kernels to one PTX module, which the driver turns into machine code.

use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = "src/kernels/cuda";

fn main() {
    println!("cargo::rerun-if-changed={FOLDER}/build.rs");
    println!("cargo::rustc-check-cfg=cfg(overlapping_launches)");
    if std::env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    for name in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for entry in std::fs::read_dir(FOLDER).expect("the kernels lie beside this script").flatten() {
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == "cu" || extension == "cuh") {
            println!("cargo::rerun-if-changed={}", path.display());
        }
    }
    // Every card since Ampere runs code made for 8.0; its driver does the rest.
    let capability = std::env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into()).replace('.', "");
    // Since 9.0 a launch may begin before the one before it has ended; device.cuh says when that is done.
    if capability.trim_end_matches('a').parse::<u32>().is_ok_and(|number| number >= 90) {
        println!("cargo::rustc-cfg=overlapping_launches");
    }
    let out = Path::new(&std::env::var_os("OUT_DIR").expect("cargo names the folder")).join("kernels.ptx");
    let nvcc = nvcc();
    let ran = Command::new(&nvcc)
        .args(["--ptx", "-O3", "--std=c++17", "--expt-relaxed-constexpr"])
        .arg(format!("-arch=compute_{capability}"))
        .args([&Path::new(FOLDER).join("kernels.cu"), Path::new("-o"), &out])
        .output();
    match ran {
        Ok(done) if done.status.success() => {}
        Ok(done) => panic!("{} failed:\n{}", nvcc.display(), String::from_utf8_lossy(&done.stderr)),
        Err(error) => panic!(
            "the feature `cuda` needs nvcc, and {} did not start ({error}): install the CUDA toolkit, or name nvcc in NVCC or its toolkit in CUDA_HOME",
            nvcc.display()
        ),
    }
}

fn nvcc() -> PathBuf {
    if let Some(path) = std::env::var_os("NVCC") {
        return path.into();
    }
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let found = homes.map(|home| home.join("bin/nvcc")).find(|path| path.exists());
    found.unwrap_or_else(|| "nvcc".into())
}
