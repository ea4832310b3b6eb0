// SPDX-License-Identifier: Apache-2.0
int rflow_odr_a();
int rflow_odr_b();

int main() { return rflow_odr_a() - rflow_odr_b(); }
