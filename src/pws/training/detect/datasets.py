"""stub"""
from __future__ import annotations
import numpy as np, torch
from torchvision import tv_tensors
from pws.training.detect.samples import DetectionSplits
from pws.training.detect.scenes import Cutouts, draw_scene

class _Mem:
    has_masks=True; keypoints=4
    def __init__(self,c,part,n,size): self.s=[draw_scene(c,size,seed=0,part=part,number=i) for i in range(n)]; self.n=size
    def __len__(self): return len(self.s)
    def size(self,i): return self.n,self.n
    def name(self,i): return f'{i}.png'
    def get(self,i):
        s=self.s[i]; m=torch.from_numpy(s.masks); N=len(m); b=torch.zeros(N,4); k=torch.zeros(N,4,3)
        for j,x in enumerate(m):
            ys,xs=x.nonzero(as_tuple=True); b[j]=torch.tensor([xs.min(),ys.min(),xs.max()+1,ys.max()+1]).float()
            k[j]=torch.tensor([[xs[0],ys[0],1],[xs[-1],ys[-1],1],[xs[xs.argmin()],ys[xs.argmin()],1],[xs[xs.argmax()],ys[xs.argmax()],1]]).float()
        return torch.from_numpy(s.image.copy()).permute(2,0,1),dict(boxes=tv_tensors.BoundingBoxes(b,format='XYXY',canvas_size=(self.n,self.n)),labels=torch.from_numpy(s.labels)+1,iscrowd=torch.zeros(N,dtype=torch.long),area=m.sum((1,2)).float(),masks=tv_tensors.Mask(m.to(torch.uint8)),keypoints=k)

def load_detection_splits(config, seed):
    from sklearn.datasets import load_digits
    d=load_digits(); px=(d.images*255/16).astype(np.uint8); c=Cutouts(px,d.target,[str(i) for i in range(10)])
    return DetectionSplits(_Mem(c,0,100,96),_Mem(c,1,24,96),c.classes)
