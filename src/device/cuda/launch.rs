//! Launches: no allocation, no waiting.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::Ordering;

use cudarc::driver::result;
use cudarc::driver::sys::{
    self, CUfunction_attribute, CUlaunchAttribute, CUlaunchAttributeID as Id, CUlaunchAttributeValue,
    CUlaunchAttributeValue_union__bindgen_ty_1 as ClusterDim, CUlaunchConfig,
};

use super::driver::failed;
use super::modules::{Function, Modules};
use super::tensor_map;
use crate::device::backend::Loaded;
use crate::device::{Launch, RawStream, TensorBoxes, TensorMap};
use crate::{Error, Result};

/// Dynamic shared memory that a kernel may have without asking.
const WITHOUT_ASKING: u32 = 48 * 1024;

impl Loaded for Modules {
    unsafe fn launch(
        &self,
        name: &str,
        launch: Launch,
        stream: RawStream,
        params: *const c_void,
        bytes: usize,
    ) -> Result<()> {
        let function = self.function(name)?;
        check(name, function, launch, bytes)?;
        self.context.bind()?;
        if launch.shared_bytes > WITHOUT_ASKING {
            opt_in(name, function)?;
        }

        let wanted = [
            (launch.cluster > 1, cluster(launch.cluster)),
            (launch.dependent && function.waits, DEPENDENT),
            (launch.resident, RESIDENT),
        ];
        let mut attributes = wanted.map(|(_, attribute)| attribute);
        let mut count = 0;
        for (_, attribute) in wanted.iter().filter(|(wanted, _)| *wanted) {
            attributes[count] = *attribute;
            count += 1;
        }
        let config = CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: stream.0.cast(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let mut arguments = [params.cast_mut()];
        // SAFETY: the driver copies `params` (of the size that the kernel has) before it returns; the
        // caller answers for what is in it and for the stream.
        unsafe {
            sys::cuLaunchKernelEx(&raw const config, function.raw, arguments.as_mut_ptr(), ptr::null_mut())
        }
        .result()
        .map_err(failed(format_args!("the kernel {name} cannot be launched ({launch:?})")))
    }

    fn preload(&self, name: &str) -> Result<()> {
        let function = self.function(name)?;
        self.context.bind()?;
        opt_in(name, function)
    }

    fn tensor_map(&self, boxes: &TensorBoxes) -> Result<TensorMap> {
        self.context.bind()?;
        tensor_map::encode(boxes)
    }
}

/// Tells the driver, once, that the kernel takes more shared memory than every kernel may.
fn opt_in(name: &str, function: &Function) -> Result<()> {
    if function.opted_in.load(Ordering::Acquire) {
        return Ok(());
    }
    let which = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: the function is loaded.
    unsafe { result::function::set_function_attribute(function.raw, which, function.shared_limit as i32) }
        .map_err(failed(format_args!("the kernel {name} cannot have more than 48 KiB of shared memory")))?;
    function.opted_in.store(true, Ordering::Release);
    Ok(())
}

/// What the driver would refuse without saying why, or not refuse at all.
fn check(name: &str, function: &Function, launch: Launch, params_bytes: usize) -> Result<()> {
    if params_bytes != function.params_bytes {
        return Err(Error::failure(format!(
            "the kernel {name} takes parameters of {} bytes and was given {params_bytes}; \
             build kernels and program from the same version",
            function.params_bytes
        )));
    }
    if launch.threads != function.threads {
        return Err(Error::failure(format!(
            "the kernel {name} runs with {} threads a block and was launched with {}",
            function.threads, launch.threads
        )));
    }
    if launch.shared_bytes > function.shared_limit {
        return Err(Error::usage(format!(
            "the kernel {name} needs {} bytes of shared memory a block and this GPU has {}; choose smaller tiles",
            launch.shared_bytes, function.shared_limit
        )));
    }
    Ok(())
}

const fn attribute(id: Id, value: CUlaunchAttributeValue) -> CUlaunchAttribute {
    CUlaunchAttribute { id, pad: [0; 4], value }
}

fn cluster(blocks: u32) -> CUlaunchAttribute {
    let dim = ClusterDim { x: blocks, y: 1, z: 1 };
    attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CUlaunchAttributeValue { clusterDim: dim })
}

const DEPENDENT: CUlaunchAttribute = attribute(
    Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
);

const RESIDENT: CUlaunchAttribute =
    attribute(Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, CUlaunchAttributeValue { cooperative: 1 });
