//! Checked launches on streams and memory that another engine lends.

use half::bf16;
use trencadis::device::{Buffer, Device, Ptr, RawStream, Stream};
use trencadis::kernels::Rows;
use trencadis::kernels::attention::{Attention, Backward, BackwardPlan, Forward, ForwardPlan, Schedule};
use trencadis::ops::{AttentionConfig, QkNormKind};

const TOKENS: usize = 48;
const HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const WIDTH: usize = HEADS * HEAD_DIM;
/// Where each of two images begins; the third slot is empty.
pub const CU_SEQLENS: [i32; 4] = [0, 5, 45, 45];

/// Attention forward and backward, and the memory that it is told beforehand to need.
pub struct Problem {
    attention: Attention,
    plans: (ForwardPlan, BackwardPlan),
}

/// What the engine gives: bytes for each.
#[derive(Clone, Copy)]
pub enum Operand {
    Qkv,
    Out,
    Lse,
    Dout,
    Dqkv,
    CuSeqlens,
    ForwardLists,
    BackwardLists,
    ForwardWorkspace,
    BackwardWorkspace,
}

use Operand::*;

/// In the order of their numbers.
pub const OPERANDS: [Operand; 10] =
    [Qkv, Out, Lse, Dout, Dqkv, CuSeqlens, ForwardLists, BackwardLists, ForwardWorkspace, BackwardWorkspace];

impl Problem {
    pub fn new(device: &Device) -> Self {
        let config = AttentionConfig { norm: QkNormKind::Rms, ..AttentionConfig::new(HEADS, HEAD_DIM) };
        let attention = Attention { config, tokens: TOKENS, slots: CU_SEQLENS.len() - 1 };
        let info = device.info();
        let plans = (attention.plan(info).unwrap(), attention.backward_plan(info).unwrap());
        Self { attention, plans }
    }

    pub fn bytes(&self, operand: Operand) -> usize {
        let words = |limits| Schedule::words_needed(limits, TOKENS, self.attention.slots).unwrap() * 4;
        match operand {
            Qkv | Dqkv => TOKENS * 3 * WIDTH * 2,
            Out | Dout => TOKENS * WIDTH * 2,
            Lse => TOKENS * HEADS * 4,
            CuSeqlens => size_of_val(&CU_SEQLENS),
            ForwardLists => words(self.plans.0.limits),
            BackwardLists => words(self.plans.1.limits),
            ForwardWorkspace => self.attention.forward_workspace_bytes(&self.plans.0, TOKENS),
            BackwardWorkspace => self.attention.backward_workspace_bytes(&self.plans.1, TOKENS, false),
        }
    }

    /// What an operand begins with.
    pub fn contents(&self, operand: Operand) -> Vec<u8> {
        let values = |seed: usize| {
            let values = (0..self.bytes(operand) / 2).map(|i| ((i * 37 + seed) % 101) as f32 / 50.0 - 1.0);
            values.flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect()
        };
        match operand {
            Qkv => values(1),
            Dout => values(2),
            CuSeqlens => CU_SEQLENS.iter().flat_map(|start| start.to_le_bytes()).collect(),
            _ => vec![0; self.bytes(operand)],
        }
    }

    /// Queues everything; `address` tells where an operand lies, of which `lend` makes a buffer.
    pub fn launch(&self, stream: &Stream, address: impl Fn(Operand) -> u64) {
        let device = stream.device();
        let lent = |operand, at: usize| {
            let bytes = self.bytes(operand) - at;
            // SAFETY: the engine keeps its memory until all has run.
            unsafe { Buffer::<u8>::from_raw(device, Ptr::from_raw(address(operand) + at as u64), bytes) }
                .unwrap()
        };
        // Three ranges that overlap: q, k and v lie in one row.
        let rows = |operand| [0, 1, 2].map(|part| lent(operand, part * WIDTH * 2));
        let (qkv, dqkv) = (rows(Qkv).map(elements), rows(Dqkv).map(elements));
        let [q, k, v] = qkv.each_ref().map(packed);
        let [dq, dk, dv] = dqkv.each_ref().map(packed);
        let [out, dout] = [Out, Dout].map(|operand| elements(lent(operand, 0)));
        let (lse, cu_seqlens) = (elements(lent(Lse, 0)), elements(lent(CuSeqlens, 0)));
        let (forward_workspace, workspace) = (lent(ForwardWorkspace, 0), lent(BackwardWorkspace, 0));
        let lists = |operand, limits| {
            let schedule =
                Schedule::in_memory(elements(lent(operand, 0)), limits, TOKENS, self.attention.slots);
            let schedule = schedule.unwrap();
            schedule.launch(stream, &cu_seqlens, None).unwrap();
            schedule
        };
        let (out, dout) = (Rows::dense(&out, WIDTH), Rows::dense(&dout, WIDTH));
        let schedule = &lists(ForwardLists, self.plans.0.limits);
        let forward = Forward {
            q,
            k,
            v,
            affine: [None; 4],
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule,
            out,
            lse: &lse,
            statistics: None,
            workspace: Some(&forward_workspace),
        };
        self.attention.forward(stream, &self.plans.0, &forward).unwrap();
        let schedule = &lists(BackwardLists, self.plans.1.limits);
        let backward = Backward {
            q,
            k,
            v,
            out,
            lse: &lse,
            dout,
            affine: [None; 4],
            rope: None,
            cu_seqlens: &cu_seqlens,
            schedule,
            dq,
            dk,
            dv,
            daffine: [None; 4],
            accumulate: None,
            workspace: &workspace,
        };
        self.attention.backward(stream, &self.plans.1, &backward).unwrap();
    }
}

fn packed(buffer: &Buffer<bf16>) -> Rows<'_, bf16> {
    Rows { buffer, offset: 0, stride: 3 * WIDTH }
}

/// The same memory as other elements.
fn elements<T: bytemuck::Pod>(bytes: Buffer<u8>) -> Buffer<T> {
    bytes.view(0..bytes.len()).unwrap()
}

#[cfg(feature = "emulator")]
mod on_the_emulator {
    use super::*;
    use crate::support::devices::devices;
    use trencadis::device::emulator::EmulatorOptions;

    /// Memory of the host, as an engine for CPUs has it.
    struct Engine(Vec<Vec<u128>>);

    impl Engine {
        fn new(problem: &Problem) -> Self {
            let room = |operand| {
                let contents = problem.contents(operand);
                let mut room = vec![0u128; contents.len().div_ceil(16).max(1)];
                bytemuck::cast_slice_mut(&mut room)[..contents.len()].copy_from_slice(&contents);
                room
            };
            Self(OPERANDS.map(room).into())
        }

        fn address(&self) -> impl Fn(Operand) -> u64 {
            let addresses: Vec<u64> = self.0.iter().map(|room| room.as_ptr() as u64).collect();
            move |operand| addresses[operand as usize]
        }

        fn results(&self) -> Vec<&[u128]> {
            [Out, Lse, Dqkv].map(|operand| &self.0[operand as usize][..]).into()
        }
    }

    /// The same on memory of the device, copied back.
    fn on_own_memory(device: &Device, problem: &Problem) -> Vec<Vec<u8>> {
        let buffers = OPERANDS.map(|operand| device.upload(&problem.contents(operand)).unwrap());
        let stream = device.stream().unwrap();
        problem.launch(&stream, |operand| buffers[operand as usize].ptr().address());
        stream.synchronize().unwrap();
        [Out, Lse, Dqkv].map(|operand| buffers[operand as usize].download().unwrap()).into()
    }

    #[test]
    fn lent_memory_has_the_same_results() {
        for device in devices().iter().filter(|device| device.info().driver.is_none()) {
            let problem = Problem::new(device);
            let expected = on_own_memory(device, &problem);
            assert!(expected.iter().all(|bytes| bytes.iter().any(|&byte| byte != 0)));
            let allocated = device.allocated_bytes();

            let engine = Engine::new(&problem);
            let null = RawStream(std::ptr::null_mut());
            // SAFETY: it is the null stream.
            let stream = unsafe { device.borrow_stream(null) }.unwrap();
            problem.launch(&stream, engine.address());
            assert_eq!(device.allocated_bytes(), allocated);
            for (lent, own) in engine.results().iter().zip(&expected) {
                assert_eq!(&bytemuck::cast_slice::<u128, u8>(lent)[..own.len()], own);
            }
        }
    }

    #[test]
    fn a_capture_of_somebody_else_takes_the_launches() {
        let device = Device::emulator(EmulatorOptions::default());
        let problem = Problem::new(&device);
        let expected = on_own_memory(&device, &problem);
        let engine = Engine::new(&problem);
        let theirs = device.stream().unwrap();
        theirs.begin_capture().unwrap();
        // SAFETY: it lives until the end of the test.
        let ours = unsafe { device.borrow_stream(theirs.raw()) }.unwrap();
        problem.launch(&ours, engine.address());
        assert!(ours.synchronize().unwrap_err().to_string().contains("cannot be captured"));
        drop(ours);
        assert!(engine.results().iter().all(|result| result.iter().all(|&word| word == 0)), "nothing ran");
        let graph = theirs.end_capture().unwrap();
        // What the graph uses is lent as long as it may run.
        let kept = OPERANDS.map(|operand| {
            let (address, bytes) = (engine.address()(operand), problem.bytes(operand));
            // SAFETY: as above.
            unsafe { Buffer::<u8>::from_raw(&device, Ptr::from_raw(address), bytes) }.unwrap()
        });
        graph.launch(&theirs).unwrap();
        theirs.synchronize().unwrap();
        drop(kept);
        for (lent, own) in engine.results().iter().zip(&expected) {
            assert_eq!(&bytemuck::cast_slice::<u128, u8>(lent)[..own.len()], own);
        }
    }

    #[test]
    fn a_bad_batch_is_told_by_the_word_of_the_caller() {
        let device = Device::emulator(EmulatorOptions::default());
        let problem = Problem::new(&device);
        let limits = problem.plans.0.limits;
        let words = Schedule::words_needed(limits, TOKENS, 3).unwrap();
        let error = Schedule::in_memory(device.zeros(words - 1).unwrap(), limits, TOKENS, 3).err().unwrap();
        assert!(
            error.to_string().contains(&format!("needs {words} words and was given {}", words - 1)),
            "{error}"
        );
        assert!(Schedule::words_needed(limits, (1 << 30) + 1, 3).is_err());

        let schedule = Schedule::in_memory(device.zeros(words).unwrap(), limits, TOKENS, 3).unwrap();
        let stream = device.stream().unwrap();
        let good = device.upload(&CU_SEQLENS).unwrap();
        schedule.launch(&stream, &good, None).unwrap();
        schedule.check().unwrap();
        schedule.launch(&stream, &device.upload(&[0, 9, 5, 5]).unwrap(), None).unwrap();
        stream.synchronize().unwrap();
        let error = schedule.check().unwrap_err();
        assert!(error.to_string().contains("cu_seqlens"), "{error}");
    }

    #[test]
    fn what_cannot_be_lent_is_one_sentence() {
        let device = Device::emulator(EmulatorOptions::default());
        let room = [0u128; 2];
        let at = room.as_ptr() as u64;
        for (address, len, part) in [
            (0, 4, "the address of 4 elements of 4 bytes is null"),
            (at + 4, 4, "is not a multiple of 16 bytes"),
            (at, usize::MAX / 2, "do not fit any memory"),
            (u64::MAX - 15, 8, "32 bytes at 0xfffffffffffffff0 end beyond the last address"),
        ] {
            // SAFETY: refused.
            let error =
                unsafe { Buffer::<f32>::from_raw(&device, Ptr::from_raw(address), len) }.err().unwrap();
            assert!(error.to_string().contains(part) && error.exit_code() == 2, "{error}");
        }
        // SAFETY: there are no elements, and the stream is another's.
        let (empty, stream) = unsafe {
            let empty = Buffer::<f32>::from_raw(&device, Ptr::from_raw(4), 0).unwrap();
            let other = Device::emulator(EmulatorOptions::default());
            (empty, device.borrow_stream(other.stream().unwrap().raw()).err().unwrap())
        };
        assert!(empty.is_empty() && empty.ptr().is_null());
        assert!(stream.to_string().contains("none of this emulator"), "{stream}");
    }

    /// What is queued on memory stays while any lending covers it, and is forgotten with the last one.
    #[test]
    fn the_end_of_one_lending_ends_no_other() {
        let device = Device::emulator(EmulatorOptions::default());
        let [stream, other] = [0; 2].map(|_| device.stream().unwrap());
        let mut room = [0u128; 4];
        let at = room.as_mut_ptr() as u64;
        // SAFETY: the array lives until the end of the test.
        let lend = |len| unsafe { Buffer::<i32>::from_raw(&device, Ptr::from_raw(at), len) }.unwrap();
        let (whole, half, flag) = (lend(16), lend(8), device.zeros::<i32>(1).unwrap());
        stream.wait_value32(&flag, 0, 1).unwrap();
        stream.write_value32(&half, 0, 7).unwrap();
        stream.write_value32(&whole, 12, 9).unwrap();
        drop(half);
        other.write_value32(&flag, 0, 1).unwrap();
        stream.synchronize().unwrap();
        let found = whole.download().unwrap();
        assert_eq!((found[0], found[12]), (7, 9));

        stream.wait_value32(&flag, 0, 2).unwrap();
        stream.write_value32(&whole, 0, 1).unwrap();
        drop(whole);
        other.write_value32(&flag, 0, 2).unwrap();
        stream.synchronize().unwrap();
        assert_eq!(lend(16).download().unwrap()[0], 7, "written after the last lending ended");
    }

    #[test]
    fn kernels_keep_to_what_is_lent() {
        let device = Device::emulator(EmulatorOptions::default());
        let stream = device.stream().unwrap();
        let (x, out) = ([0x0101_0101_0101_0101u64; 4], [0u128; 2]);
        let copy = |x: u64, out: u64, size: i64| {
            let params = trencadis::kernels::measure::CopyParams {
                out: Ptr::from_raw(out),
                x: Ptr::from_raw(x),
                size,
            };
            // SAFETY: the emulator looks at every address.
            unsafe { trencadis::kernels::measure::launch_copy(device.kernels(), stream.raw(), &params) }
        };
        let source = device.upload(&x).unwrap();
        let target = out.as_ptr() as u64;
        copy(source.ptr().address(), target, 16).unwrap_err();
        // SAFETY: the array lives until the end of the test.
        let lent = unsafe { Buffer::<u128>::from_raw(&device, Ptr::from_raw(target), 1) }.unwrap();
        copy(source.ptr().address(), target, 8).unwrap();
        assert_eq!(bytemuck::cast_slice::<_, u8>(&lent.download().unwrap()), [1; 16]);
        let error = copy(source.ptr().address(), target, 16).unwrap_err();
        assert!(error.to_string().contains("measure_copy_bf16"), "{error}");
        drop(lent);
        copy(source.ptr().address(), target, 8).unwrap_err();
    }
}
