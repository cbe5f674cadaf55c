; The checksum update for every input, in integers: SAT solvers do not finish on it, linear arithmetic does at once.
;
; A model of nat_sum_fold() and nat_csum_update() in core/csum.h. ~x of a 16-bit x is 65535 - x, of a 32-bit x
; 4294967295 - x. `s mod m` and `s div m` are written as low and high with s = low + m * high. Each claim is negated:
; "unsat" means that there is no counterexample.

(define-fun word ((x Int)) Bool (and (<= 0 x) (<= x 65535)))
; "sum is `low` + `high` parts of s": one step of folding
(define-fun split ((s Int) (m Int) (low Int) (high Int)) Bool (and (= s (+ low (* m high))) (<= 0 low) (< low m) (<= 0 high)))
; What folding gives: f is a word, differs from s by k times 65535, and is 0 for 0 only.
(define-fun is-fold ((s Int) (f Int) (k Int)) Bool (and (word f) (= (- s f) (* 65535 k)) (= (= f 0) (= s 0))))

; Claim: nat_sum_fold() gives a word that is congruent to the sum modulo 65535, and 0 for 0 only.
; For: every sum below 2^64.
(push)
(declare-const s Int)
(declare-const l1 Int) (declare-const h1 Int) (declare-const l2 Int) (declare-const h2 Int)
(declare-const l3 Int) (declare-const h3 Int) (declare-const l4 Int) (declare-const h4 Int)
(assert (and (<= 0 s) (< s 18446744073709551616)))
(assert (split s 4294967296 l1 h1))
(assert (split (+ l1 h1) 65536 l2 h2))
(assert (split (+ l2 h2) 65536 l3 h3))
(assert (split (+ l3 h3) 65536 l4 h4))
(assert (not (is-fold s (+ l4 h4) (+ (* 65537 h1) h2 h3 h4))))
(check-sat)
(pop)

; Claim: after an address (two words, high and low) and a port change, the updated checksum is the one that full
; recomputation gives.
; For: every address, port and sum of the rest, unless all that is summed is zero afterwards.
(push)
(declare-const rest Int)
(declare-const old-high Int) (declare-const old-low Int) (declare-const old-port Int)
(declare-const new-high Int) (declare-const new-low Int) (declare-const new-port Int)
(declare-const before Int) (declare-const k1 Int) ; folded sum before, ~checksum
(declare-const after Int) (declare-const k2 Int)  ; folded sum after
(declare-const updated Int) (declare-const k3 Int)
(assert (and (word old-high) (word old-low) (word old-port) (word new-high) (word new-low) (word new-port)))
(assert (<= 0 rest))
(assert (is-fold (+ rest old-high old-low old-port) before k1))
(assert (is-fold (+ rest new-high new-low new-port) after k2))
(assert (is-fold (+ before (- 4294967295 (+ (* 65536 old-high) old-low)) (+ (* 65536 new-high) new-low)
                    (- 65535 old-port) new-port) updated k3))
(assert (> after 0))
(assert (not (= updated after)))
(check-sat)
(pop)

; Claim: in the case left out the update gives checksum 0 (and 0xffff would be right): rewrite.c looks for that one.
; For: every message that becomes all zeros and was not so before.
(push)
(declare-const before Int) (declare-const change Int)
(declare-const updated Int) (declare-const k Int) (declare-const j Int)
(assert (and (<= 1 before) (<= before 65535) (<= 0 change)))
(assert (= (+ before change) (* 65535 j))) ; congruent to the new sum, which is 0
(assert (is-fold (+ before change) updated k))
(assert (not (= updated 65535)))
(check-sat)
(pop)

; Claim: the exception in the second claim is needed: without it there is a counterexample.
; For: one input.
; Expect: sat
(push)
(declare-const before Int) (declare-const change Int) (declare-const updated Int) (declare-const k Int)
(declare-const j Int)
(assert (and (<= 1 before) (<= before 65535) (<= 0 change) (= (+ before change) (* 65535 j))))
(assert (is-fold (+ before change) updated k))
(assert (not (= updated 0)))
(check-sat)
(pop)
