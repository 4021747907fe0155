//! How much a thread waits for at one time: loads from global memory whose results nothing has touched yet. What keeps memory
//! busy is this, times the threads of a multiprocessor.

/// Loads under way in straight-line code.
#[derive(Debug, Default)]
pub struct Flight {
    /// First register, registers and bytes of each, in order.
    loads: Vec<(u32, u32, u32)>,
}

impl Flight {
    /// Takes in an instruction, such as `LDG.E.128 R4, desc[UR4][R2.64] ;`, and returns the bytes that are under way.
    pub fn take(&mut self, code: &str) -> u32 {
        let (operation, operands) = code.split_once(' ').unwrap_or((code, ""));
        let loads = operation.split('.').next() == Some("LDG");
        let (result, read) = match operands.split_once(',') {
            Some((result, read)) if loads => (registers(result).next(), read),
            _ => (None, operands),
        };
        let touched: Vec<u32> = registers(read).chain(result).collect();
        let waits = |&(first, count, _): &(u32, u32, u32)| {
            touched.iter().any(|register| (first..first + count).contains(register))
        };
        // Who waits for a load has those before it too.
        if let Some(last) = self.loads.iter().rposition(waits) {
            self.loads.drain(..=last);
        }
        if let Some(first) = result {
            let bytes = bytes(operation);
            self.loads.push((first, bytes.div_ceil(4), bytes));
        }
        self.loads.iter().map(|load| load.2).sum()
    }
}

/// Bytes that a load brings a thread.
fn bytes(operation: &str) -> u32 {
    let width = operation.split('.').find_map(|word| match word {
        "128" => Some(16),
        "64" => Some(8),
        "U16" | "S16" => Some(2),
        "U8" | "S8" => Some(1),
        _ => None,
    });
    width.unwrap_or(4)
}

/// Numbers of the registers that a text names; `RZ` and those of the whole warp (`UR4`) are none.
fn registers(text: &str) -> impl Iterator<Item = u32> {
    text.split(|c: char| !c.is_ascii_alphanumeric()).filter_map(|word| word.strip_prefix('R')?.parse().ok())
}

#[test]
fn counts_what_is_under_way() {
    let mut flight = Flight::default();
    let bytes: Vec<u32> = [
        "LDG.E.128 R4, desc[UR4][R2.64] ;",
        "LDG.E.128.CONSTANT R8, desc[UR4][R2.64+0x200] ;",
        "IMAD.WIDE R2, R0, 0x4, R2 ;",
        "LDG.E.U8 R12, desc[UR4][R2.64] ;",
        "FADD R1, R0, R5 ;",
        "STG.E desc[UR4][R2.64], R1 ;",
        "LDG.E.64 R8, desc[UR4][R2.64] ;",
        "FADD R1, R9, RZ ;",
        "EXIT ;",
    ]
    .into_iter()
    .map(|code| flight.take(code))
    .collect();
    // What is loaded over a register that was waited for counts once.
    assert_eq!(bytes, [16, 32, 32, 33, 17, 17, 9, 0, 0]);
}
