//! `include/trencadis.h` is what `src/capi` says, and C and C++ understand it as Rust does.

use std::fmt::Write as _;
use std::fs;
use std::mem::offset_of;
use std::path::PathBuf;
use std::process::Command;

use tempfile::tempdir;
use trencadis::capi;

/// Set to write the header instead of comparing it.
const WRITE: &str = "TRENCADIS_WRITE_HEADER";

fn root() -> PathBuf {
    env!("CARGO_MANIFEST_DIR").into()
}

/// In the order of the header.
fn sources() -> Vec<PathBuf> {
    let files = ["mod", "status", "handle", "attention", "windows", "gemm", "norm", "pool"];
    files.iter().map(|name| root().join(format!("src/capi/{name}.rs"))).collect()
}

fn generate() -> String {
    let config = cbindgen::Config::from_file(root().join("include/cbindgen.toml")).unwrap();
    // It follows the modules of the first file.
    let builder = cbindgen::Builder::new().with_config(config).with_src(&sources()[0]);
    let mut text = Vec::new();
    builder.generate().unwrap().write(&mut text);
    // What a caller promises, without Rust's heading.
    String::from_utf8(text).unwrap().replace("// # Safety\n", "")
}

#[test]
fn the_header_is_that_of_the_source() {
    let (path, expected) = (root().join("include/trencadis.h"), generate());
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, expected).unwrap();
        return;
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let line = found.lines().zip(expected.lines()).position(|(found, expected)| found != expected);
    assert!(
        found == expected,
        "include/trencadis.h differs from src/capi from line {} on; write it with `{WRITE}=1 cargo test --features \
         emulator,capi --test capi_header`",
        line.map_or(found.lines().count().min(expected.lines().count()), |line| line) + 1
    );
}

/// Everything that unwinds would be undefined: the whole of every function runs in `guard`, but for two that compute
/// nothing.
#[test]
fn no_function_unwinds() {
    let mut functions = 0;
    for path in sources() {
        let text = fs::read_to_string(&path).unwrap();
        for function in text.split("extern \"C\" fn ").skip(1) {
            let name = &function[..function.find('(').unwrap()];
            let body = &function[function.find(" {\n").unwrap()..function.find("\n}").unwrap()];
            assert!(name.starts_with("trencadis_"), "{name}");
            let constant = ["trencadis_abi_version", "trencadis_version"].contains(&name);
            assert_eq!(body.matches("guard(|| ").count(), usize::from(!constant), "{name}:{body}");
            functions += 1;
        }
    }
    assert!(functions >= 20, "{functions}");
}

/// Compiles a file that holds the header to the layout that Rust has.
#[test]
fn c_and_cxx_have_the_same_structs() {
    let folder = tempdir().unwrap();
    let mut text = String::from(
        "#include \"trencadis.h\"\n#ifdef __cplusplus\n#define _Static_assert static_assert\n#endif\n",
    );
    let mut holds = |what: String, value: usize| {
        let _ = writeln!(text, "_Static_assert({what} == {value}, \"{what}\");");
    };
    // Size, and where the last field lies.
    macro_rules! check {
        ($($name:literal: $type:ident, $last:ident;)*) => {$(
            holds(format!("sizeof({})", $name), size_of::<capi::$type>());
            holds(format!("offsetof({}, {})", $name, stringify!($last)), offset_of!(capi::$type, $last));
            holds(format!("offsetof({}, size)", $name), offset_of!(capi::$type, size));
        )*};
    }
    check! {
        "trencadis_attention": Attention, accumulate;
        "trencadis_attention_sizes": AttentionSizes, backward_workspace_bytes;
        "trencadis_device_info": DeviceInfo, name;
        "trencadis_gemm": Gemm, workspace_bytes;
        "trencadis_norm": Norm, workspace_bytes;
        "trencadis_pool": Pool, accumulate;
        "trencadis_pool_sizes": PoolSizes, backward_workspace_bytes;
        "trencadis_windows": Windows, longest;
    }
    holds("TRENCADIS_STATUS_PANIC".into(), capi::Status::Panic as usize);
    holds("TRENCADIS_DTYPE_F32".into(), capi::Dtype::F32 as usize);
    holds("TRENCADIS_ABI_VERSION".into(), capi::TRENCADIS_ABI_VERSION as usize);
    text.push_str("int main(void) { return 0; }\n");
    for (compiler, standard, extension) in
        [("cc", "c11", "c"), ("c++", "c++11", "cpp"), ("c++", "c++20", "cpp")]
    {
        let file = folder.path().join(format!("layout.{extension}"));
        fs::write(&file, &text).unwrap();
        let done = Command::new(compiler)
            .args(["-std=".to_owned() + standard, "-fsyntax-only".into()])
            .args(["-Wall", "-Wextra", "-Werror", "-pedantic", "-I"])
            .arg(root().join("include"))
            .arg(&file)
            .output()
            .unwrap();
        assert!(done.status.success(), "{compiler} {standard}:\n{}", String::from_utf8_lossy(&done.stderr));
    }
}
