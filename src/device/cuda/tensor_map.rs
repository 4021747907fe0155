//! Tensor maps as a GPU reads them.

use std::ptr;

use cudarc::driver::sys::{
    self, CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as Fill,
    CUtensorMapInterleave as Interleave, CUtensorMapL2promotion as Promotion, CUtensorMapSwizzle as Swizzle,
};

use super::driver::failed;
use crate::Result;
use crate::device::tensor_map::{TensorBoxes, TensorElement, TensorMap, TensorSwizzle};

/// The map of boxes that were checked.
pub(super) fn encode(boxes: &TensorBoxes) -> Result<TensorMap> {
    let element = match boxes.element {
        TensorElement::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        TensorElement::F32 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    let swizzle = match boxes.swizzle {
        TensorSwizzle::None => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        TensorSwizzle::Bytes32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
        TensorSwizzle::Bytes64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
        TensorSwizzle::Bytes128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
    };
    let sizes: Vec<u64> = boxes.sizes.iter().map(|&size| size.into()).collect();
    let steps = vec![1_u32; sizes.len()];
    let mut map = CUtensorMap { opaque: [0; 16] };
    // SAFETY: writes the map; every array has as many elements as the rank, the strides one less.
    unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut map,
            element,
            sizes.len() as u32,
            ptr::with_exposed_provenance_mut(boxes.address as usize),
            sizes.as_ptr(),
            boxes.strides.as_ptr(),
            boxes.tile.as_ptr(),
            steps.as_ptr(),
            Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    }
    .result()
    .map_err(failed(format_args!("a tensor map cannot be made ({boxes:?})")))?;
    Ok(TensorMap(map.opaque))
}
